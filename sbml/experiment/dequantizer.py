"""``config.dequantizer``: the dequantizer that is trained, beside those with nothing to learn."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from sbml import dequantizers
from sbml.experiment.fields import (
    Section,
    check_choice,
    check_fields,
    check_owned,
    choice,
    named,
    tupled,
)
from sbml.experiment.optim import DequantizerOptim
from sbml.experiment.training import DequantizerTraining

# What a run gives a dequantizer, and no config.
OF_THE_RUN = ("levels", "tau")


def options(name: str) -> dict[str, Any]:
    """The fields of dequantizer ``name`` that a config may set, with their defaults."""
    fields = dataclasses.fields(dequantizers.get(name))
    return {field.name: field.default for field in fields if field.name not in OF_THE_RUN}


@dataclasses.dataclass(frozen=True)
class Options(Section):
    """``config.dequantizer.model``: the dequantizer's own fields, which its class explains.

    The class checks their ranges when the dequantizer is built, the section around it their types.
    """

    section: ClassVar[str] = "dequantizer.model"

    values: Mapping[str, Any]

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """Of the fields; the section around it knows which there must be."""
        return cls({field: tupled(value) for field, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The fields."""
        return dict(self.values)


@dataclasses.dataclass(frozen=True)
class Dequantizer(Section):
    """The Flow++ dequantizer of CIFAR-10.

    Raises:
      ValueError: naming a field, its value and what it may be.
    """

    section: ClassVar[str] = "dequantizer"

    name: str = choice("variational", dequantizers.DEQUANTIZERS)
    model: Options = Options(options("variational"))
    training: DequantizerTraining = DequantizerTraining()
    optim: DequantizerOptim = DequantizerOptim()

    def check(self) -> None:
        """There is something to train, and the fields are its own."""
        if not dequantizers.is_trained(dequantizers.get(self.name)):
            raise ValueError(
                f"dequantizer.name={self.name} has nothing to train; choose variational"
            )
        section, values = self.model.section, self.model.values
        check_fields(section, values, options(self.name))
        check_owned(section, values, dequantizers.get(self.name))

    def build(self, name: str, *, levels: int, tau: float) -> Any:
        """The dequantizer ``name``, from those fields that it has.

        Args:
          name: of ``dequantizers.DEQUANTIZERS``; need not be the one that is trained.
          levels: of the data.
          tau: half a bin in standard deviations of the noise at the smallest time.

        Raises:
          ValueError: for an unknown name, or fields outside their ranges.
        """
        kind = dequantizers.get(check_choice("dequantizer", name, dequantizers.DEQUANTIZERS))
        fields = {**self.model.values, "levels": levels, "tau": tau}
        known = {field.name for field in dataclasses.fields(kind)}
        with named(self.model.section):
            return kind(**{field: value for field, value in fields.items() if field in known})
