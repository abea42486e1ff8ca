"""An SDE: replace alpha (``mean_coef``) and sigma (``std``), and its fields."""

import dataclasses

import jax.numpy as jnp

from sbml.sdes import SDE


@dataclasses.dataclass(frozen=True)
class Steep(SDE):
    """The variance-preserving SDE with B(t) = 0.1 t + slope t^2."""

    slope: float = 5.0

    def mean_coef(self, t):
        return jnp.exp(-0.5 * (0.1 * t + self.slope * t**2))

    def std(self, t):
        return jnp.sqrt(-jnp.expm1(-(0.1 * t + self.slope * t**2)))
