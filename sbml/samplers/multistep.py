"""DPM-Solver++(2M): the ODE integrated in half log-SNR, with the last two predictions of x_0.

    l = log(alpha / sigma),   h = l_t - l_s,   r = (l_s - l_before) / h
    x_t = (sigma_t / sigma_s) x_s - alpha_t (e^-h - 1) D,
    D   = x_0(s) + (x_0(s) - x_0(before)) / (2 r)

It is of second order with one evaluation in each step. The first and the last step use D = x_0(s).

Reference: Lu et al. 2022, "DPM-Solver++", algorithm 2.
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from sbml.core.door import typed
from sbml.core.scalars import Steps
from sbml.core.types import Array, Example, Score
from sbml.samplers._grid import FixedSteps, Spacing, Triple, denoise
from sbml.sdes import SDE


@typed
@dataclasses.dataclass(frozen=True)
class DPMSolver(FixedSteps):
    """A deterministic sampler for 10 to 50 steps."""

    own_obstacle: ClassVar[str] = "it remembers predictions, so a step is no map of x alone"

    steps: Steps = 20
    spacing: Spacing = "log_snr"

    def init(self, z: Example) -> tuple[Example, Array]:
        return jnp.zeros_like(z), jnp.asarray(0)

    def step(
        self,
        score: Score,
        sde: SDE,
        x: Example,
        carry: tuple[Example, Array],
        times: Triple,
        z: Example,
    ) -> tuple[Example, tuple[Example, Array]]:
        (last, i), (before, s, t) = carry, times
        x_0 = denoise(score, sde, x, s)
        # No time precedes the first step. This value keeps the branch that is not used finite.
        before = jnp.where(i == 0, 0.5 * (s + t), before)
        half_s, half_t = 0.5 * sde.log_snr(s), 0.5 * sde.log_snr(t)
        h = half_t - half_s
        r = (half_s - 0.5 * sde.log_snr(before)) / h
        of_first_order = (i == 0) | (i == self.steps - 1)
        d = jnp.where(of_first_order, x_0, x_0 + (x_0 - last) / (2 * r))
        x = sde.std(t) / sde.std(s) * x - sde.mean_coef(t) * jnp.expm1(-h) * d
        return x, (x_0, i + 1)
