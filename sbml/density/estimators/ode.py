"""-log p_eps(x) by the probability-flow ODE, with K draws of the dequantizer.

    -log p_eps(x) = prior + divergence + correction

Each of these terms is minus the term of the same name in ``sbml.likelihood``. For K draws of u, let
w_i = log p(x_i) - log q(u_i) and W_i = exp(w_i) / sum_j exp(w_j). Then

    -log (1/K) sum_i exp(w_i) = sum_i W_i (-w_i) + [log K + sum_i W_i log W_i],

so every term is the average of the draws' terms with weights W, and the bracket is the term
``importance``, the KL divergence of W from the uniform weights 1/K, which is at least 0. With K > 1
the densities must be exact: noise in w makes the result too small by half of its variance.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Float

from sbml import dequantizers, likelihood
from sbml.core.streams import stream
from sbml.core.types import Array, Key, PyTree, Scalar, Score
from sbml.density.estimators import base
from sbml.density.estimators.base import Evaluations, OneExample, Points, Target
from sbml.likelihood import Likelihood
from sbml.likelihood.ode import Solver
from sbml.score.divergence import Trace

PerDraw = Float[Array, "k"]


@dataclasses.dataclass(frozen=True)
class Estimator(base.Estimator):
    """The likelihood of the probability-flow ODE; ``num_importance`` > 1 needs the exact trace."""

    terms: ClassVar[tuple[str, ...]] = (*likelihood.TERMS, "dequantization", "importance", "scale")
    is_bound: ClassVar[bool] = False

    trace: Trace = Trace()
    num_importance: int = 1
    solver: Solver = Solver()

    def __post_init__(self) -> None:
        if self.num_importance > 1 and self.trace.kind != "exact":
            raise ValueError(
                f"num_importance={self.num_importance} with a {self.trace.kind} trace: the noise "
                "of the probes would make the model look better than it is; use the exact trace"
            )

    @classmethod
    def reason_undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        if dequantizers.has_density(dequantizer):
            return ""
        return "this dequantizer has a bound only, so there is no density to solve for"

    def one(
        self, score: Score, params: PyTree, data: OneExample, key: Key, u: Points, target: Target
    ) -> tuple[dict[str, Scalar], Evaluations]:
        def draw(key: Key) -> tuple[dict[str, Scalar], Evaluations]:
            terms, result = self.solved(score, params, data, key, target)
            return terms, result.stats.nfe

        if self.num_importance == 1:
            terms, nfe = draw(key)
            return {**terms, "importance": jnp.zeros(())}, nfe
        each, evaluations = jax.lax.map(draw, jax.random.split(key, self.num_importance))
        return averaged(each), jnp.sum(evaluations)

    def solved(
        self, score: Score, params: PyTree, data: OneExample, key: Key | None, target: Target
    ) -> tuple[dict[str, Scalar], Likelihood]:
        """The terms of one draw of the dequantizer, and its likelihood.

        ``key`` may be None for continuous data with an exact trace.
        """
        draws = probes = None
        if key is not None:
            draws, probes = stream(key, "dequantization"), stream(key, "probes")
        x, log_q = target.sample(params, data, draws)
        result = likelihood.ode_logp(
            score, target.sde, x, probes, eps=target.eps, trace=self.trace, solver=self.solver
        )
        terms = {name: -term for name, term in result.terms.items()}
        return {**terms, "dequantization": log_q}, result


def averaged(each: dict[str, PerDraw]) -> dict[str, Scalar]:
    """The W-averages of the terms ``(K,)`` of K draws, and ``importance``, in nats.

    ``importance`` is log K + sum_i W_i log W_i.

    A draw of weight 0, such as one of density 0, adds 0, although one of its terms is infinite.
    """
    log_weights = jax.nn.log_softmax(-sum(each.values()))
    weights = jnp.exp(log_weights)

    def average(term: PerDraw) -> Scalar:
        return jnp.sum(jnp.where(weights == 0, 0, weights * term))

    terms = {name: average(term) for name, term in each.items()}
    return {**terms, "importance": average(log_weights) + math.log(len(weights))}
