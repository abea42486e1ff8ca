"""An estimator of -log p: replace the formula in ``one`` and the names of its terms."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from sbml.density.estimators import base


@dataclasses.dataclass(frozen=True)
class Normal(base.Estimator):
    """-log N(x; 0, std^2 I), which does not depend on the score."""

    std: float = 1.0
    terms: ClassVar[tuple[str, ...]] = ("prior", "dequantization", "scale")
    is_bound: ClassVar[bool] = False

    def one(self, score, params, data, key, u, target):
        x, log_q = target.sample(params, data, key)
        log_z = x.size * (jnp.log(self.std) + 0.5 * jnp.log(2 * jnp.pi))
        return {"prior": 0.5 * jnp.sum((x / self.std) ** 2) + log_z, "dequantization": log_q}, 0


@dataclasses.dataclass(frozen=True)
class WideNormal(Normal):
    """The same with another value of the field: ``mine.estimator:WideNormal``."""

    std: float = 2.0
