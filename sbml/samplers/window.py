"""Paths that have noise in a window of their steps only, as policies do that learn from few steps.

    steps first, ..., last - 1 (from 0)    those of a sampler with noise
    all other steps                        DDIM's, without noise

A step without noise has no density. Its entry of ``PathLogProb.steps`` is 0, so a ratio of
policies has the factor 1 there. Its dependence on the parameters is not in the policy gradient.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbml.core.scalars import Number
from sbml.core.types import Array, Example, Score
from sbml.samplers._grid import FixedSteps, Times, Triple
from sbml.samplers.one_step import DDIM
from sbml.sdes import SDE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(FixedSteps):
    """``FixedSteps.window`` makes it. Its state is the number of the step."""

    sampler: FixedSteps
    first: int
    last: int

    @property
    def nfe(self) -> int:
        """See ``Chain``."""
        return self.sampler.nfe

    def times(self, sde: SDE, eps: Number) -> Times:
        """See ``Chain``."""
        return self.sampler.times(sde, eps)

    def obstacle(self, deterministic: bool) -> str:
        """See ``Chain``."""
        same = dataclasses.replace(self.sampler, corrector=self.corrector)
        return same.obstacle(deterministic)

    def init(self, z: Example) -> Array:
        return jnp.asarray(0)

    def step(
        self, score: Score, sde: SDE, x: Example, carry: Array, times: Triple, z: Example
    ) -> tuple[Example, Array]:
        x = jax.lax.cond(
            (self.first <= carry) & (carry < self.last),
            lambda: self.sampler.step(score, sde, x, (), times, z)[0],
            lambda: DDIM().step(score, sde, x, (), times, z)[0],
        )
        return x, carry + 1

    def _log_steps(self, score: Score, sde: SDE, x: Array, times: Times) -> Array:
        inside = slice(self.first, self.last + 1)
        steps = self.sampler._log_steps(score, sde, x[inside], times[inside])
        return jnp.pad(steps, (self.first, self.steps - self.last))
