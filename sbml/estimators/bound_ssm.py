"""The evidence bound whose diffusion term is estimated by sliced or exact score matching.

    diffusion = Z d / 2 + Z E [1/2 sigma^2 (|s|^2 + 2 div s)]        (``sbml.bound``)

It has the same expectation as the denoising form, but more noise, and no Gaussian control.
"""

import dataclasses
from typing import Any, ClassVar

import jax

from sbml import bound, dequantizers
from sbml.bound import Reduction
from sbml.divergence import Trace
from sbml.estimators import bound as dsm
from sbml.estimators.base import Count, Data, Target
from sbml.types import Key, Scalar, Score


@dataclasses.dataclass(frozen=True)
class Estimator(dsm.Estimator):
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

    def one(
        self,
        score: Score,
        params: Any,
        data: Data,
        key: Key,
        u: Any,
        method: Reduction,
        target: Target,
    ) -> tuple[dict[str, Scalar], Count]:
        u_key, key = jax.random.split(key)
        x, log_q = target.sample(params, data, u_key)
        draws: dict[str, Any] = {"eps": target.eps, "u": u, "reduction": method}
        terms = bound.elbo(score, target.sde, x, key, trace=self.trace, **draws)
        return {**terms._asdict(), "dequantization": log_q}, u.size + 1
