"""``config.dequantizer``: the dequantizer that ``--mode=train_dequantizer`` trains."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import pydantic

from sbml import dequantizers
from sbml.dequantizers import DEQUANTIZERS
from sbml.experiment.fields import Chosen, Section, field, one_of, section_errors
from sbml.experiment.optim import DequantizerOptim
from sbml.experiment.training import DequantizerTraining


class Options(Chosen):
    """The fields of the dequantizer, which its class explains. Its name is ``dequantizer.name``."""

    section: ClassVar[str] = "dequantizer.model"
    parts: ClassVar[Mapping[str, Any]] = DEQUANTIZERS
    # The data and the SDE determine these.
    skip: ClassVar[tuple[str, ...]] = ("levels", "tau")

    name: Annotated[str, one_of(DEQUANTIZERS)] = field("variational", "the dequantizer")

    def values(self) -> dict[str, Any]:
        """The fields of the class."""
        return self.own


class Dequantizer(Section):
    """Settings of the dequantizer that is trained; the defaults are Flow++ for CIFAR-10."""

    section: ClassVar[str] = "dequantizer"

    name: Annotated[str, one_of(DEQUANTIZERS)] = field("variational", "the dequantizer to train")
    model: Options = Options()
    training: DequantizerTraining = DequantizerTraining()
    optim: DequantizerOptim = DequantizerOptim()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _named(cls, values: Any) -> Any:
        """The name belongs to the fields of its class."""
        if isinstance(values, dict) and not isinstance(values.get("model"), Options):
            name = values.get("name", cls.model_fields["name"].default)
            if name in DEQUANTIZERS and isinstance(own := values.get("model", {}), Mapping):
                if not dequantizers.is_trained(DEQUANTIZERS[name]):
                    raise ValueError(
                        f"dequantizer.name={name} has no parameters to train; choose variational"
                    )
                return {**values, "model": Options(**{**own, "name": name})}
        return values

    def build(self, name: str, *, levels: int, tau: float) -> Any:
        """The dequantizer ``name``, with those of the section's fields that its class has.

        Args:
          name: a name of ``DEQUANTIZERS``; it need not be the one that is trained.
          levels: number of levels of the data.
          tau: half a bin's width in standard deviations of the noise at the smallest time.
        """
        kind = DEQUANTIZERS[name]
        fields = {**self.model.own, "levels": levels, "tau": tau}
        names = {field.name for field in dataclasses.fields(kind)}
        with section_errors(self.model.section):
            return kind(**{field: value for field, value in fields.items() if field in names})
