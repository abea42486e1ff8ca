"""The probability-flow ODE with step control: the inverse of ``likelihood.ode_logp``'s map."""

import dataclasses

import jax
import jax.numpy as jnp

from sbml import sampling
from sbml.ode import Solver, Stats, transport
from sbml.samplers._grid import Path, Times, frames_of
from sbml.scalars import Number
from sbml.sdes import SDE
from sbml.types import Example, Key, Scalar, Score


@dataclasses.dataclass(frozen=True)
class ODE:
    """Deterministic given the latent; ``solver`` says how exact."""

    solver: Solver = Solver("dopri5", rtol=1e-3, atol=1e-3)

    def __call__(
        self, score: Score, sde: SDE, z: Example, key: Key | None, *, eps: Number
    ) -> tuple[Example, Stats]:
        """See ``Sampler``."""
        return sampling.decode(score, sde, z, eps=eps, solver=self.solver)

    def path(
        self, score: Score, sde: SDE, z: Example, key: Key | None, *, eps: Number, frames: int
    ) -> tuple[Path, Times]:
        """See ``Sampler``; the frames are evenly spaced in the solver's coordinate, and of fixed
        steps are the nearest of those."""
        power, steps = self.solver.power, self.solver.fixed_steps
        pieces = steps or frames - 1
        times = jnp.linspace(sde.T ** (1 / power), eps ** (1 / power), pieces + 1) ** power
        solver = dataclasses.replace(self.solver, fixed_steps=steps and 1)

        def piece(x: Example, ends: tuple[Scalar, Scalar]) -> tuple[Example, Example]:
            x, _ = transport(score, sde, x, *ends, solver)
            return x, x

        _, path = jax.lax.scan(piece, z, (times[:-1], times[1:]))
        return frames_of(z, path, times, frames)


SAMPLERS = {"ode": ODE}
