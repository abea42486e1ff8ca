"""The variance-exploding SDEs, whose sigma grows geometrically or linearly.

Both have alpha = 1:

    VE          sigma = sigma_min (sigma_max / sigma_min)^t
    linear VE   sigma = sigma_max t
"""

import dataclasses
import math
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from sbml.core import scalars
from sbml.core.door import typed
from sbml.core.scalars import Number, at_least, positive
from sbml.core.types import Elementwise
from sbml.sdes.base import ClosedForm, Levels


@dataclasses.dataclass(frozen=True)
class _Exploding(ClosedForm):
    """The base of variance-exploding SDEs: f = 0, and a prior of standard deviation sigma_max."""

    sigma_max: Annotated[Number, positive] = 50.0

    @property
    def prior_std(self) -> Number:
        return self.sigma_max

    def drift_coef(self, t: Elementwise) -> Elementwise:
        return jnp.zeros_like(t)

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return jnp.ones_like(t)


def _check_range(sigma_min: Number, sigma_max: Number) -> None:
    traced = scalars.is_traced(sigma_min, sigma_max)
    if not traced and not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min={sigma_min}, sigma_max={sigma_max}: give finite 0 < sigma_min < sigma_max"
        )


@typed
@dataclasses.dataclass(frozen=True)
class VE(_Exploding):
    """Variance exploding, geometric: sigma(t) = sigma_min (sigma_max / sigma_min)^t."""

    sigma_min: Number = 0.01

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    @property
    def _log_ratio(self) -> Number:
        return scalars.log(self.sigma_max / self.sigma_min)

    def diffusion(self, t: Elementwise) -> Elementwise:
        return scalars.sqrt(2 * self._log_ratio) * self.std(t)

    def std(self, t: Elementwise) -> Elementwise:
        return self.sigma_min * jnp.exp(self._log_ratio * t)

    def log_snr(self, t: Elementwise) -> Elementwise:
        return -2 * (scalars.log(self.sigma_min) + self._log_ratio * t)

    def time(self, log_snr: Elementwise) -> Elementwise:
        return (-0.5 * log_snr - scalars.log(self.sigma_min)) / self._log_ratio

    @typed
    def levels(self, n: Annotated[int, at_least(2)]) -> Levels:
        """alpha_i = 1, and sigma_i geometric from sigma_min to sigma_max.

        These are the levels of SMLD (score matching with Langevin dynamics, Song & Ermon 2019).
        Here sigma increases with the index; in the paper it decreases.
        """
        stds = np.geomspace(self.sigma_min, self.sigma_max, n)
        return Levels((1.0,) * n, tuple(stds))


@typed
@dataclasses.dataclass(frozen=True)
class LinearVE(_Exploding):
    """Variance exploding, linear: sigma(t) = sigma_max t, the schedule of EDM."""

    def diffusion(self, t: Elementwise) -> Elementwise:
        return self.sigma_max * jnp.sqrt(2 * t)

    def std(self, t: Elementwise) -> Elementwise:
        return self.sigma_max * t

    def time(self, log_snr: Elementwise) -> Elementwise:
        return jnp.exp(-0.5 * log_snr) / self.sigma_max


@typed
@dataclasses.dataclass(frozen=True)
class EDM(LinearVE):
    """EDM's noise levels: ``LinearVE`` from ``sigma_min``, at the smallest time, to ``sigma_max``.

    For EDM's inner network F use ``from_prediction(F, "edm", EDM(), data_std=0.5)``: it is called
    with x / sqrt(v) and log(sigma) / 4 (``sbml.score``). For the denoiser D(x, sigma) use
    ``from_prediction(lambda x, t: D(x, sde.std(t)), "x0", sde)`` with ``sde = EDM()``.

    Reference: Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models",
    NeurIPS 2022.
    """

    sigma_max: Number = 80.0
    sigma_min: Number = 0.002

    def __post_init__(self) -> None:
        _check_range(self.sigma_min, self.sigma_max)

    @property
    def smallest_time(self) -> Number:  # type: ignore[override]
        """The time at which sigma is ``sigma_min``."""
        return self.sigma_min / self.sigma_max
