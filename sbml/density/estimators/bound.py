"""The evidence bound on -log p(x), or on -log P(k) of the integers k, in its two forms.

    -log p(x) <= prior + diffusion + reconstruction        (``sbml.bound``)

A dequantizer that has its own bound (``sbml.dequantizers``) gives these terms directly for the
integers. The terms for dequantization and for the change of variables are then 0.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml import dequantizers
from sbml.core.streams import stream
from sbml.core.types import Array, Key, PyTree, Scalar, Score
from sbml.density.estimators import base
from sbml.density.estimators.base import Evaluations, OneExample, Points, Target
from sbml.likelihood import bound
from sbml.likelihood.bound import Reduction
from sbml.score.divergence import Trace
from sbml.sdes import times


@dataclasses.dataclass(frozen=True)
class Estimator(base.Estimator):
    """The evidence bound in its denoising form.

    Attributes:
      form: the names of the fields that choose the form of the diffusion term in ``bound.elbo``.
    """

    terms: ClassVar[tuple[str, ...]] = (*bound.Bound._fields, "dequantization", "scale")
    is_bound: ClassVar[bool] = True
    reducible: ClassVar[bool] = True
    form: ClassVar[tuple[str, ...]] = ()

    n_times: int = 1
    draw: str = "lattice"
    reduction: Reduction = Reduction()

    @classmethod
    def reason_undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        if num_importance > 1:
            return (
                "a bound is an expectation: the logarithm of a mean of K noisy draws of it bounds "
                f"nothing (K={num_importance}); use the ode estimator with the exact trace"
            )
        if dequantizer.at_noise and not dequantizers.has_bound(dequantizer):
            return (
                "this dequantizer draws noise around bin centres (at_noise) and has no bound of "
                "its own for the integers: give its Model a method bound (sbml.dequantizers)"
            )
        return ""

    def one(
        self, score: Score, params: PyTree, data: OneExample, key: Key, u: Points, target: Target
    ) -> tuple[dict[str, Scalar], Evaluations]:
        assert u is not None  # ``points`` gives them.
        sde, model, bound_key = target.sde, target.dequantizer, stream(key, "bound")
        how: dict[str, Any] = {name: getattr(self, name) for name in self.form}
        how |= {"eps": target.eps, "u": u, "reduction": self.reduction}
        if dequantizers.has_bound(model):
            terms = model.bound(params, score, sde, data, bound_key, target.levels, **how)
            return {**terms._asdict(), "dequantization": jnp.zeros(())}, u.size + model.calls
        x, log_q = target.sample(params, data, stream(key, "dequantization"))
        terms = bound.elbo(score, sde, x, bound_key, **how)
        return {**terms._asdict(), "dequantization": log_q}, u.size + 1

    def scale_nats(self, target: Target, shape: tuple[int, ...]) -> float:
        return 0.0 if dequantizers.has_bound(target.dequantizer) else target.scale_nats(shape)

    def tail(self, target: Target) -> float:
        return self.reduction.tail(target.sde, target.eps)

    def points(self, seed: int, sweep: int, n: int) -> np.ndarray:
        key = base.times_key(seed, sweep)
        return np.asarray(_compiled(times.DRAWS[self.draw])(key, n, self.n_times))


@functools.cache
def _compiled(draw: Callable[..., Array]) -> Callable[..., Array]:
    return jax.jit(draw, static_argnums=(1, 2))


@dataclasses.dataclass(frozen=True)
class ScoreMatching(Estimator):
    """The evidence bound whose diffusion term is estimated by sliced or exact score matching.

        diffusion = Z d / 2 + Z E [1/2 sigma^2 (|s|^2 + 2 div s)]

    It has the same expectation as the denoising form, but more noise, and no Gaussian control.
    """

    reducible: ClassVar[bool] = False
    form: ClassVar[tuple[str, ...]] = ("trace",)

    trace: Trace = Trace()

    @classmethod
    def reason_undefined(cls, dequantizer: type[Any], num_importance: int) -> str:
        if dequantizers.has_bound(dequantizer):
            return (
                "the bound of this dequantizer for the integers is in the denoising form only: use "
                "the estimator bound"
            )
        return super().reason_undefined(dequantizer, num_importance)


@dataclasses.dataclass(frozen=True)
class InSteps(Estimator):
    """The evidence bound of a chain in discrete time: of ``steps`` steps of DDPM, or of these steps
    (``bound.chain``)."""

    form: ClassVar[tuple[str, ...]] = ("steps",)

    steps: int | bound.Steps = 1000
