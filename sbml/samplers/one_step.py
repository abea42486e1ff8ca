"""Samplers whose step sees one time: x at t from x at s > t, noise z, by the score at s.

With the forward kernel p(x_s | x_t) = N(a x_t, b^2 I),

    a = alpha_s / alpha_t,   b^2 = sigma_s^2 - a^2 sigma_t^2,
    x_0 ~ (x + sigma_s^2 score) / alpha_s,   noise ~ -sigma_s score,   h = s - t

    Euler-Maruyama      x - h (f x - g^2 score) + g sqrt(h) z         of the reverse SDE, at s
    reverse diffusion   (2 - a) x + b^2 score + b z                   (Song et al. 2021a, eq. 46)
    ancestral           the mean of p(x_t | x, x_0) + (b sigma_t / sigma_s) z     (Ho et al. 2020)
    DDIM                alpha_t x_0 + sqrt(sigma_t^2 - c^2) noise + c z,
                        c = eta b sigma_t / sigma_s                   (Song, Meng & Ermon 2021)

where b sigma_t / sigma_s = sigma_t sqrt(1 - r), r = exp(lambda_s - lambda_t). With eta = 1, DDIM is
ancestral sampling; with 0 it is deterministic, of first order in log-SNR.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp

from sbml.samplers._grid import FixedSteps, Triple
from sbml.sampling import predictions
from sbml.sdes import SDE
from sbml.types import Example, Scalar, Score, deterministic


def forward(sde: SDE, t: Scalar, s: Scalar) -> tuple[Scalar, Scalar]:
    """a and b of p(x_s | x_t), t < s; b by rates that do not cancel for small steps.

    b^2 = sigma_s^2 (1 - exp(lambda_s - lambda_t)).
    """
    drop = sde.log_snr(s) - sde.log_snr(t)
    return sde.mean_coef(s) / sde.mean_coef(t), sde.std(s) * jnp.sqrt(-jnp.expm1(drop))


class EulerMaruyama(FixedSteps):
    """The reverse SDE by Euler and Maruyama."""

    def step(
        self, score: Score, sde: SDE, x: Example, carry: Any, times: Triple, z: Example
    ) -> tuple[Example, Any]:
        s, h = times[1], times[1] - times[2]
        g = sde.diffusion(s)
        drift = sde.drift(x, s) - g**2 * deterministic(score, x, s)
        return x - h * drift + g * jnp.sqrt(h) * z, carry


class ReverseDiffusion(FixedSteps):
    """The forward chain's own discretisation, reversed."""

    def step(
        self, score: Score, sde: SDE, x: Example, carry: Any, times: Triple, z: Example
    ) -> tuple[Example, Any]:
        a, b = forward(sde, times[2], times[1])
        return (2 - a) * x + b**2 * deterministic(score, x, times[1]) + b * z, carry


@dataclasses.dataclass(frozen=True)
class DDIM(FixedSteps):
    """Along the line through x_0 and the noise; ``eta`` in [0, 1] is the share of fresh noise."""

    spacing: str = "log_snr"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta}: must lie in [0, 1]")

    def step(
        self, score: Score, sde: SDE, x: Example, carry: Any, times: Triple, z: Example
    ) -> tuple[Example, Any]:
        _, s, t = times
        x_0, noise = predictions(score, sde, x, s)
        drop = sde.log_snr(s) - sde.log_snr(t)
        c = self.eta * sde.std(t) * jnp.sqrt(-jnp.expm1(drop))
        # sigma_t^2 - c^2 as a sum: the difference is less than nothing where a step is long.
        kept = sde.std(t) * jnp.sqrt(1 - self.eta**2 + self.eta**2 * jnp.exp(drop))
        return sde.mean_coef(t) * x_0 + kept * noise + c * z, carry


@dataclasses.dataclass(frozen=True)
class Ancestral(DDIM):
    """The posterior of the forward chain given x_0: DDIM with all of the noise fresh."""

    spacing: str = "time"
    eta: ClassVar[float] = 1.0  # type: ignore[misc]


SAMPLERS = {
    "euler_maruyama": EulerMaruyama,
    "reverse_diffusion": ReverseDiffusion,
    "ancestral": Ancestral,
    "ddim": DDIM,
}
