"""Truncated-normal dequantization: the diffusion's own noise at time eps, kept inside the bin.

With c = 2 (k + 1/2) / L - 1 the bin's centre, h = 1 / L its half-width, rho = sigma / alpha at eps,

    x = c + rho e,    e ~ N(0, 1) truncated to [-tau, tau],    tau = h / rho,

so that alpha x is nearly what diffusing c to time eps gives, and the density to ask is p_eps. As u
in the bin, u = 1/2 + e / (2 tau) and, per dimension, with Z = erf(tau / sqrt 2),

    log q(u) = log(2 tau) - e^2 / 2 - log(2 pi) / 2 - log Z,
    E log q(u) = log(2 tau) - (1 + log 2 pi) / 2 - log Z + tau exp(-tau^2 / 2) / (sqrt(2 pi) Z).

Nothing is learned: eps follows from the number of levels by tau = 3. It fits a model trained on bin
centres (``data.dequantization=centre``).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from sbml import compiler
from sbml.types import Array, Key

TAU = 3.0


def log_snr(levels: int, tau: float = TAU) -> float:
    """lambda(eps) at which the noise's ``tau`` standard deviations fill half a bin."""
    return -2 * math.log(1 / (levels * tau))


def truncated_normal(e: Array, tau: float) -> Array:
    """N(0, 1) truncated to [-tau, tau] by a monotone map of standard normal ``e``, any shape."""
    low = 0.5 * math.erfc(tau / math.sqrt(2))
    # Halves are mapped by symmetry: a probability near 1 has lost its digits.
    magnitude = -ndtri(low + (1 - 2 * low) * jax.scipy.special.ndtr(-jnp.abs(e)))
    return jnp.clip(jnp.sign(e) * magnitude, -tau, tau)


@dataclasses.dataclass(frozen=True)
class Model:
    """A dequantizer with nothing to learn; ``tau`` is half a bin in standard deviations of noise.

    Raises:
      ValueError: if ``tau`` is not positive.
    """

    at_noise: ClassVar[bool] = True

    tau: float = TAU

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau}: must be positive")

    @property
    def _log_normaliser(self) -> float:
        """log of the density of u at the bin's centre."""
        z = math.erf(self.tau / math.sqrt(2))
        return math.log(2 * self.tau / z) - 0.5 * math.log(2 * math.pi)

    def init(self, key: Key, pixels: Array) -> Any:
        """No parameters."""
        return {}

    def sample(self, params: Any, pixels: Array, key: Key) -> tuple[Array, Array]:
        """u of the shape of one example ``pixels (*s)``, and log q(u | pixels) in nats."""
        compiler.check()
        e = truncated_normal(jax.random.normal(key, pixels.shape), self.tau)
        u = jnp.clip(0.5 + e / (2 * self.tau), 0.0, 1 - jnp.finfo(e.dtype).epsneg)
        return u, e.size * self._log_normaliser - 0.5 * jnp.sum(e**2)
