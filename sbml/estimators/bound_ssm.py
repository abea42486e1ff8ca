"""The evidence bound whose diffusion term is estimated by sliced or exact score matching.

    diffusion = Z d / 2 + Z E [1/2 sigma^2 (|s|^2 + 2 div s)]        (``sbml.bound``)

It has the same expectation as the denoising form, but more noise, and no Gaussian control.
"""

import dataclasses
from typing import Any, ClassVar

from sbml import dequantizers
from sbml.divergence import Trace
from sbml.estimators import bound


@dataclasses.dataclass(frozen=True)
class Estimator(bound.Estimator):
    """The evidence bound in its score-matching form."""

    reducible: ClassVar[bool] = False

    trace: Trace = Trace()

    @classmethod
    def reason_undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        if dequantizers.has_bound(dequantizer):
            return (
                "the bound of this dequantizer for the integers is in the dsm form only: use the "
                "estimator bound"
            )
        return super().reason_undefined(dequantizer, num_importance)
