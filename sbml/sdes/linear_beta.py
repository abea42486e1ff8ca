"""VP and subVP, whose beta(t) is linear.

With its integral B(t),

    VP      alpha = exp(-B / 2)    sigma^2 = 1 - exp(-B)
    subVP   alpha = exp(-B / 2)    sigma = 1 - exp(-B)
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core import scalars
from sbml.core.door import typed
from sbml.core.scalars import Number, at_least
from sbml.core.types import Elementwise
from sbml.sdes.base import ClosedForm, Levels

# With a larger beta, the signal is lost almost at once, and float32 cannot tell the few times apart
# at which a network denoises.
LARGEST_BETA = 1000.0


@dataclasses.dataclass(frozen=True)
class _LinearBeta(ClosedForm):
    """The base of VP and subVP: beta(t) = beta_min + (beta_max - beta_min) t, its integral B(t)."""

    beta_min: Number = 0.1
    beta_max: Number = 20.0

    def __post_init__(self) -> None:
        concrete = not scalars.is_traced(self.beta_min, self.beta_max)
        if concrete and not 0 < self.beta_min <= self.beta_max <= LARGEST_BETA:
            raise ValueError(
                f"beta_min={self.beta_min}, beta_max={self.beta_max}: give numbers with "
                f"0 < beta_min <= beta_max <= {LARGEST_BETA:g}"
            )

    def _beta(self, t: Elementwise) -> Elementwise:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Elementwise) -> Elementwise:
        """B(t), the integral of beta over [0, t]."""
        return t * (self.beta_min + 0.5 * (self.beta_max - self.beta_min) * t)

    def _time(self, integral: Elementwise) -> Elementwise:
        """The inverse of B; this form of the quadratic's root has no cancellation."""
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return -0.5 * self._beta(t)

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return jnp.exp(-0.5 * self._integral(t))


@typed
@dataclasses.dataclass(frozen=True)
class VP(_LinearBeta):
    """Variance preserving: alpha^2 + sigma^2 = 1, the continuous limit of DDPM."""

    def diffusion(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(self._beta(t))

    def std(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def log_snr(self, t: Elementwise) -> Elementwise:
        integral = self._integral(t)
        return -(integral + jnp.log(-jnp.expm1(-integral)))

    def time(self, log_snr: Elementwise) -> Elementwise:
        return self._time(jax.nn.softplus(-log_snr))

    @typed
    def levels(self, n: Annotated[int, at_least(2)]) -> Levels:
        """DDPM's levels (Ho et al. 2020).

        alpha_i^2 = prod_{j <= i} (1 - beta_j) with beta_j linear in j; sigma_i^2 = 1 - alpha_i^2.
        """
        if n <= self.beta_max:
            raise ValueError(
                f"{n} noise levels with beta_max={self.beta_max}: the last beta is "
                f"{self.beta_max / n:g}, not below 1; give more than {self.beta_max:g} levels"
            )
        betas = np.linspace(self.beta_min / n, self.beta_max / n, n)
        log_mean = 0.5 * np.cumsum(np.log1p(-betas))
        return Levels(tuple(np.exp(log_mean)), tuple(np.sqrt(-np.expm1(2 * log_mean))))


@typed
@dataclasses.dataclass(frozen=True)
class SubVP(_LinearBeta):
    """sub-VP: the same alpha as VP, and sigma = 1 - alpha^2, which is at most VP's sigma."""

    smallest_time: ClassVar[float] = 1e-2  # Below it, sigma is so small that training is unstable.

    def diffusion(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(-self._beta(t) * jnp.expm1(-2 * self._integral(t)))

    def std(self, t: Elementwise) -> Elementwise:
        return -jnp.expm1(-self._integral(t))

    def log_snr(self, t: Elementwise) -> Elementwise:
        integral = self._integral(t)
        return -(integral + 2 * jnp.log(-jnp.expm1(-integral)))

    def time(self, log_snr: Elementwise) -> Elementwise:
        return self._time(2 * jnp.arcsinh(0.5 * jnp.exp(-0.5 * log_snr)))
