"""The noise schedules of "Variational Diffusion Models", as SDEs.

    gamma(t) = -log SNR,      alpha^2 = sigmoid(-gamma),      sigma^2 = sigmoid(gamma)

So alpha^2 + sigma^2 = 1, and every increasing gamma makes a variance-preserving SDE with

    f = -1/2 sigma^2 gamma',      g^2 = sigma^2 gamma',      g^2 / sigma^2 = gamma'.

    linear     gamma = gamma_0 + (gamma_1 - gamma_0) t (fixed, or with learned ends)
    monotone   gamma = |k1| t + b1 + mean_j |k3_j| (2 sigmoid(|k2_j| (2 t - 1) + b2_j) - 1)

gamma(0) is finite: there is some noise at t = 0 already, and nothing diverges there. So the times
of these SDEs are in [0, 1]; eps = 0 is allowed, and it is the default. For a score that depends on
t through gamma(t) only, the bounds and the likelihood in continuous time depend on gamma(0) and
gamma(1), not on gamma between them.

Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", NeurIPS 2021, section 3.
"""

import abc
import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from sbml.core import scalars
from sbml.core.door import typed
from sbml.core.scalars import Number
from sbml.core.types import Array, Elementwise
from sbml.sdes.base import ClosedForm


@dataclasses.dataclass(frozen=True)
class _Gamma(ClosedForm):
    """A variance-preserving SDE, defined by its gamma; all methods are elementwise in t."""

    smallest_time: ClassVar[float] = 0.0

    @abc.abstractmethod
    def gamma(self, t: Elementwise) -> Elementwise:
        """-log SNR, increasing in t."""

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(jax.nn.sigmoid(-self.gamma(t)))

    def std(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(jax.nn.sigmoid(self.gamma(t)))

    def log_snr(self, t: Elementwise) -> Elementwise:
        return -self.gamma(t)

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return -0.5 * jax.nn.sigmoid(self.gamma(t)) * self.rate(t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(jax.nn.sigmoid(self.gamma(t)) * self.rate(t))


@typed
@dataclasses.dataclass(frozen=True)
class LinearGamma(_Gamma):
    """gamma = gamma_0 + (gamma_1 - gamma_0) t; the defaults are the published values."""

    gamma_0: Number = -13.3
    gamma_1: Number = 5.0

    def __post_init__(self) -> None:
        ends = (self.gamma_0, self.gamma_1)
        if not scalars.is_traced(*ends) and not -math.inf < ends[0] < ends[1] < math.inf:
            raise ValueError(
                f"gamma_0={self.gamma_0}, gamma_1={self.gamma_1}: give finite gamma_0 < gamma_1"
            )

    def gamma(self, t: Elementwise) -> Elementwise:
        return self.gamma_0 + (self.gamma_1 - self.gamma_0) * t

    def rate(self, t: Elementwise) -> Elementwise:
        return (self.gamma_1 - self.gamma_0) * jnp.ones_like(t)

    def time(self, log_snr: Elementwise) -> Elementwise:
        return (-log_snr - self.gamma_0) / (self.gamma_1 - self.gamma_0)


@dataclasses.dataclass(frozen=True)
class MonotoneGamma(_Gamma):
    """gamma from a network, which is monotone because it uses the absolute values of its kernels.

    It is the learned schedule of a VDM checkpoint and has no name in configs: the checkpoint is
    converted to ``LinearGamma`` with the same ends, which gives the same bound, because
    VDM's network depends on t through gamma(t) only.

    Attributes:
      k1, b1: the slope of the linear part and its value at 0, scalars.
      k2, b2, k3: slopes, offsets and heights of the m sigmoids, ``(m,)`` each: arrays, or tuples
        if the SDE has to be hashable.
    """

    k1: float | Array
    b1: float | Array
    k2: tuple[float, ...] | Array
    b2: tuple[float, ...] | Array
    k3: tuple[float, ...] | Array

    def _units(self, t: Elementwise) -> tuple[Array, Array, Array]:
        """Slopes and heights of the sigmoids, and their values at ``t``, along a new last axis."""
        t = jnp.asarray(t, jnp.result_type(t, 1.0))
        shape = (1,) * t.ndim + (-1,)
        k2, b2, k3 = (
            jnp.reshape(jnp.asarray(p, t.dtype), shape) for p in (self.k2, self.b2, self.k3)
        )
        slope, height = jnp.abs(k2), jnp.abs(k3)
        return slope, height, jax.nn.sigmoid(slope * (2 * t[..., None] - 1) + b2)

    def gamma(self, t: Elementwise) -> Elementwise:
        _, height, s = self._units(t)
        return jnp.abs(self.k1) * t + self.b1 + jnp.mean(height * (2 * s - 1), axis=-1)

    def rate(self, t: Elementwise) -> Elementwise:
        slope, height, s = self._units(t)
        return jnp.abs(self.k1) + jnp.mean(4 * height * slope * s * (1 - s), axis=-1)
