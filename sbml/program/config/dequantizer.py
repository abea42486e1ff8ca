"""``config.dequantizer``: the dequantizer that ``--mode=train_dequantizer`` trains."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, ClassVar

import pydantic

from sbml import dequantizers
from sbml.core.scalars import Number
from sbml.core.types import Json
from sbml.dequantizers import DEQUANTIZERS
from sbml.program.config.fields import Section, among, errors_of, field, section_of
from sbml.program.config.optim import DequantizerOptim
from sbml.program.config.training import DequantizerTraining


class Dequantizer(Section):
    """Settings of ``--mode=train_dequantizer``; the defaults are Flow++ for CIFAR-10.

    ``model`` has the fields of the class called ``name``, apart from ``levels`` and ``tau``, which
    the data and the SDE determine.
    """

    section: ClassVar[str] = "dequantizer"

    name: Annotated[str, among(DEQUANTIZERS)] = field("variational", "the dequantizer to train")
    model: Section = Section()
    training: DequantizerTraining = DequantizerTraining()
    optim: DequantizerOptim = DequantizerOptim()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_model(cls, values: Json) -> Json:
        name = values.get("name", cls.model_fields["name"].default)
        own = values.get("model", {})
        if name not in DEQUANTIZERS:  # The check of the name refuses it.
            return {**values, "model": Section()}
        if not isinstance(own, Mapping | Section):
            return values  # The check of this field refuses it.
        with errors_of(cls.name_of("name")):
            kind = DEQUANTIZERS[name]
        if not dequantizers.is_trained(kind):
            raise ValueError(
                f"dequantizer.name={name} has no parameters to train; choose variational"
            )
        made = section_of(kind, cls.name_of("model"), ("levels", "tau"))
        return {**values, "model": made(**dict(own))}

    def build(self, name: str, *, levels: int, tau: Number) -> dequantizers.Dequantizer:
        """The dequantizer ``name``, which may be one without training.

        It takes those fields of ``model`` that its class has. At the smallest time, half a bin is
        ``tau`` standard deviations of the noise wide.
        """
        kind = DEQUANTIZERS[name]
        fields = {**dict(self.model), "levels": levels, "tau": tau}
        names = {field.name for field in dataclasses.fields(kind)}
        with errors_of(f"config.{self.name_of('model')}"):
            return kind(**{field: value for field, value in fields.items() if field in names})
