"""One-step samplers: x at time t from x at time s > t, the score at s, and noise z.

With the forward kernel p(x_s | x_t) = N(a x_t, b^2 I),

    a = alpha_s / alpha_t,   b^2 = sigma_s^2 - a^2 sigma_t^2,
    x_0 ~ (x + sigma_s^2 score) / alpha_s,   noise ~ -sigma_s score,   h = s - t

    Euler-Maruyama     x - h (f x - g^2 score) + g sqrt(h) z                of the reverse SDE, at s
    flow policies      x - h (f x - (g^2 + q^2) / 2 score) + q sqrt(h) z    of any noise q, at s
    reverse diffusion  (2 - a) x + b^2 score + b z                          (Song et al., eq. 46)
    ancestral          E[x_t | x, x_0] + (b sigma_t / sigma_s) z            (Ho et al. 2020)
    DDIM               alpha_t x_0 + sqrt(sigma_t^2 - c^2) noise + c z,
                       c = eta b sigma_t / sigma_s                          (Song, Meng & Ermon)
    midpoint           alpha_t x_0 + (sigma_t / sigma_s) (x - alpha_s x_0)  (Lu et al. 2022)

where the midpoint's x_0 is predicted from DDIM's step to the middle in log-SNR,
b sigma_t / sigma_s = sigma_t sqrt(1 - r) and r = exp(lambda_s - lambda_t). With eta = 1, DDIM is
ancestral sampling; with eta = 0 it is deterministic and of first order in log-SNR. The midpoint is
deterministic and of second order.

References: Song et al., "Score-Based Generative Modeling through SDEs", ICLR 2021; Ho et al.,
"Denoising Diffusion Probabilistic Models", NeurIPS 2020; Song, Meng, Ermon, "Denoising Diffusion
Implicit Models", ICLR 2021; Lu et al., "DPM-Solver++", 2022, algorithm 1 with r = 1/2; Liu et al.,
"Flow-GRPO", 2025, equation 9.
"""

import dataclasses
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp

from sbml.core.door import typed
from sbml.core.scalars import Number, Steps, between, positive
from sbml.core.types import Example, Scalar, Score, deterministic
from sbml.samplers._grid import FixedSteps, Spacing, denoise, predictions
from sbml.samplers.density import Transition
from sbml.sdes import SDE


class EulerMaruyama(FixedSteps):
    """The Euler-Maruyama method for the reverse SDE."""

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        g, q, h = sde.diffusion(s), self.noise(sde, s, t), s - t
        drift = sde.drift(x, s) - 0.5 * (g**2 + q**2) * deterministic(score, x, s)
        return Transition(x - h * drift, q * jnp.sqrt(h))

    def noise(self, sde: SDE, s: Scalar, t: Scalar) -> Scalar:
        """q of the step from ``s`` to ``t``: with any q, the SDE has the same distributions of x at
        each time."""
        return sde.diffusion(s)


@typed
@dataclasses.dataclass(frozen=True)
class FlowPolicy(EulerMaruyama):
    """The noise q = a sqrt(sigma_s / alpha_s) of policy gradients for flow matching (Flow-GRPO).

    For ``RectifiedFlow`` this is a sqrt(t / (1 - t)). The first step, where it would be nearly
    infinite, has the alpha of its end.
    """

    steps: Steps = 10
    a: Annotated[Number, positive] = 0.7

    def noise(self, sde: SDE, s: Scalar, t: Scalar) -> Scalar:
        last = jnp.where(s > 0.9999 * sde.largest_time, t, s)
        return self.a * jnp.sqrt(sde.std(s) / sde.mean_coef(last))


class ReverseDiffusion(FixedSteps):
    """The discretisation of the reverse SDE that matches the forward chain (eq. 46)."""

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        # b^2 = sigma_s^2 (1 - exp(lambda_s - lambda_t)) does not cancel for small steps.
        drop = sde.log_snr(s) - sde.log_snr(t)
        a, b = sde.mean_coef(s) / sde.mean_coef(t), sde.std(s) * jnp.sqrt(-jnp.expm1(drop))
        return Transition((2 - a) * x + b**2 * deterministic(score, x, s), b)


@typed
@dataclasses.dataclass(frozen=True)
class DDIM(FixedSteps):
    """Denoising diffusion implicit models; ``eta`` in [0, 1] is the share of fresh noise."""

    spacing: Spacing = "log_snr"
    eta: Annotated[Number, between(0, 1)] = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.eta, jax.core.Tracer):
            object.__setattr__(self, "eta", float(self.eta))  # An array is not hashable.

    @property
    def deterministic(self) -> bool:
        return bool(self.eta == 0)

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        x_0, noise = predictions(score, sde, x, s)
        drop = sde.log_snr(s) - sde.log_snr(t)
        c = self.eta * sde.std(t) * jnp.sqrt(-jnp.expm1(drop))
        # sqrt(sigma_t^2 - c^2) as a sum: in a long step, rounding can make the difference negative.
        rest = sde.std(t) * jnp.sqrt(1 - self.eta**2 + self.eta**2 * jnp.exp(drop))
        return Transition(sde.mean_coef(t) * x_0 + rest * noise, c)


@typed
@dataclasses.dataclass(frozen=True)
class Ancestral(DDIM):
    """A draw from the forward chain's posterior given x_0: DDIM with eta = 1."""

    spacing: Spacing = "time"
    eta: ClassVar[Number] = 1.0  # type: ignore[misc]


@typed
@dataclasses.dataclass(frozen=True)
class Midpoint(FixedSteps):
    """A deterministic sampler of second order for 5 to 20 steps of two evaluations."""

    evaluations: ClassVar[int] = 2
    deterministic: ClassVar[bool] = True

    steps: Steps = 10
    spacing: Spacing = "log_snr"

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        middle = sde.time(0.5 * (sde.log_snr(s) + sde.log_snr(t)))
        half, _ = DDIM().transition(score, sde, x, s, middle)
        x_0 = denoise(score, sde, half, middle)
        rest = sde.std(t) / sde.std(s) * (x - sde.mean_coef(s) * x_0)
        return Transition(sde.mean_coef(t) * x_0 + rest, jnp.zeros_like(t))
