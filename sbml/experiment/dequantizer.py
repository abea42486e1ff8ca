"""``config.dequantizer``: the dequantizer that ``--mode=train_dequantizer`` trains."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from sbml import dequantizers
from sbml.experiment.fields import (
    Section,
    as_tuples,
    check_choice,
    check_fields,
    check_owned,
    choice,
    section_errors,
)
from sbml.experiment.optim import DequantizerOptim
from sbml.experiment.training import DequantizerTraining

# Fields of a dequantizer that the data and the SDE determine; a config cannot set them.
OF_THE_RUN = ("levels", "tau")


def options(name: str) -> dict[str, Any]:
    """The fields of dequantizer ``name`` that a config may set, with their defaults."""
    fields = dataclasses.fields(dequantizers.get(name))
    return {field.name: field.default for field in fields if field.name not in OF_THE_RUN}


@dataclasses.dataclass(frozen=True)
class Options(Section):
    """``config.dequantizer.model``: the fields of the dequantizer, which its class describes.

    :class:`Dequantizer` checks the names and types of the fields. The dequantizer's class checks
    their ranges when the dequantizer is built.
    """

    section: ClassVar[str] = "dequantizer.model"

    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """The section with these fields; :class:`Dequantizer` checks that their names are right."""
        return cls({field: as_tuples(value) for field, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(self.values)


@dataclasses.dataclass(frozen=True)
class Dequantizer(Section):
    """Settings of the dequantizer that is trained; the defaults are Flow++ for CIFAR-10.

    Raises:
      ValueError: a field is invalid; the message gives its name, value and range.
    """

    section: ClassVar[str] = "dequantizer"

    name: str = choice("variational", dequantizers.DEQUANTIZERS)
    model: Options = Options(options("variational"))
    training: DequantizerTraining = DequantizerTraining()
    optim: DequantizerOptim = DequantizerOptim()

    @classmethod
    def default(cls, name: str) -> Self:
        """The section with the defaults of the dequantizer called ``name``.

        Raises:
          ValueError: there is no such dequantizer, or it has no parameters to train.
        """
        check_choice("dequantizer.name", name, dequantizers.DEQUANTIZERS)
        return cls(name=name, model=Options(options(name)))

    def check(self) -> None:
        """Check that the dequantizer has parameters to train, and that ``model`` has its fields."""
        if not dequantizers.is_trained(dequantizers.get(self.name)):
            raise ValueError(
                f"dequantizer.name={self.name} has no parameters to train; choose variational"
            )
        section, values = self.model.section, self.model.values
        check_fields(section, values, options(self.name), f"default(dequantizer={self.name!r})")
        check_owned(section, values, dequantizers.get(self.name))

    def build(self, name: str, *, levels: int, tau: float) -> Any:
        """The dequantizer ``name``, with those of the section's fields that its class has.

        Args:
          name: a key of ``dequantizers.DEQUANTIZERS``; it need not be the one that is trained.
          levels: number of levels of the data.
          tau: half a bin's width in standard deviations of the noise at the smallest time.

        Raises:
          ValueError: the name is unknown, or a field is outside its range.
        """
        kind = dequantizers.get(check_choice("dequantizer", name, dequantizers.DEQUANTIZERS))
        fields = {**self.model.values, "levels": levels, "tau": tau}
        names = {field.name for field in dataclasses.fields(kind)}
        with section_errors(self.model.section):
            return kind(**{field: value for field, value in fields.items() if field in names})
