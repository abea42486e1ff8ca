"""Two schedules from the data to pure noise: alpha(1) = 0, sigma(1) = 1.

    rectified flow   alpha = 1 - t             sigma = t                 (flow matching)
    cosine           alpha = cos(pi t / 2)     sigma = sin(pi t / 2)     (VP: alpha^2 + sigma^2 = 1)

References: Liu et al. 2023, Lipman et al. 2023; Nichol & Dhariwal 2021, without their offset.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from sbml.core.types import Elementwise
from sbml.sdes.base import LEAST_LOG_SNR, SDE


@dataclasses.dataclass(frozen=True)
class RectifiedFlow(SDE):
    """The straight line from x_0 to noise: the path of rectified flow and flow matching.

    Its noise at ``smallest_time`` is the same as VP's at VP's ``smallest_time``: sigma = 1e-3.
    """

    smallest_time: ClassVar[float] = 1e-3

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return 1 - t

    def std(self, t: Elementwise) -> Elementwise:
        return t

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return -1 / (1 - t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(2 * t / (1 - t))

    def log_snr(self, t: Elementwise) -> Elementwise:
        return 2 * (jnp.log1p(-t) - jnp.log(t))

    def rate(self, t: Elementwise) -> Elementwise:
        return 2 / (t * (1 - t))

    def time(self, log_snr: Elementwise) -> Elementwise:
        return jax.nn.sigmoid(-0.5 * log_snr)

    @property
    def largest_time(self) -> float:
        return 1 / (1 + math.exp(0.5 * LEAST_LOG_SNR))


@dataclasses.dataclass(frozen=True)
class Cosine(SDE):
    """The cosine schedule, variance preserving; alpha is written so that it is exactly 0 at 1."""

    smallest_time: ClassVar[float] = 1e-3

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return jnp.sin(0.5 * math.pi * (1 - t))

    def std(self, t: Elementwise) -> Elementwise:
        return jnp.sin(0.5 * math.pi * t)

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return -0.5 * math.pi * self._ratio(t)

    def diffusion(self, t: Elementwise) -> Elementwise:
        return jnp.sqrt(math.pi * self._ratio(t))

    def log_snr(self, t: Elementwise) -> Elementwise:
        return -2 * jnp.log(self._ratio(t))

    def rate(self, t: Elementwise) -> Elementwise:
        return math.pi / (self.mean_coef(t) * self.std(t))

    def time(self, log_snr: Elementwise) -> Elementwise:
        return 2 / math.pi * jnp.arctan(jnp.exp(-0.5 * log_snr))

    @property
    def largest_time(self) -> float:
        return 2 / math.pi * math.atan(math.exp(-0.5 * LEAST_LOG_SNR))

    def _ratio(self, t: Elementwise) -> Elementwise:
        """sigma / alpha = tan(pi t / 2)."""
        return self.std(t) / self.mean_coef(t)
