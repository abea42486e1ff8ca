"""The probability-flow ODE as a sampler: the inverse of the map of ``likelihood.ode_logp``.

    x(T) = z ~ N(0, S^2 I),  dx/dt = v(x, t)  for t from T to eps

S is the standard deviation of the prior, and v the velocity of ``sbml.ode``.
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbml.core.door import checked, typed
from sbml.core.scalars import Number, Steps
from sbml.core.types import Example, Key, Scalar, Score, in_full_precision
from sbml.likelihood.ode import METHODS, Solver, Stats, flow
from sbml.samplers._grid import Frames, Times, denoise, frames_of
from sbml.samplers.density import Chain, Transition
from sbml.sdes import SDE


@checked
def decode(
    score: Score,
    sde: SDE,
    z: Example,
    *,
    eps: Number,
    solver: Solver = Solver(),
    denoise_last: bool = False,
) -> tuple[Example, Stats]:
    """The sample ``(*s)`` of the latent ``z (*s)``, one example in the scale of the data, and the
    solver's stats. The sample is NaN if the solver gave up.

    Args:
      score: a score of one example, called deterministically.
      sde: the forward process.
      z: the latent at T.
      eps: the smallest time, where the solve ends.
      solver: how the ODE is solved.
      denoise_last: whether the sample is E[x_0 | x_eps] instead of x_eps.

    Raises:
      ValueError: eps is not in (0, T), or the score's shape is not that of ``z``.
    """
    sde.check_time(eps)
    found = flow(score, sde, z, sde.T, eps, solver)
    x = found.x
    return (denoise(score, sde, x, jnp.asarray(eps, x.dtype)) if denoise_last else x), found.stats


@checked
def ode_sample(
    score: Score,
    sde: SDE,
    shape: tuple[int, ...],
    key: Key,
    *,
    eps: Number,
    solver: Solver = Solver(),
    denoise_last: bool = False,
) -> tuple[Example, Stats]:
    """One sample of shape ``shape`` (:func:`decode`); ``key`` draws its latent. vmap over keys."""
    z = sde.prior_sample(key, shape)
    return decode(score, sde, z, eps=eps, solver=solver, denoise_last=denoise_last)


@typed
@dataclasses.dataclass(frozen=True)
class ODE(Chain):
    """The solution of the ODE by ``solver``; it is deterministic, so ``key`` may be None."""

    solver: Solver = Solver("dopri5", rtol=1e-3, atol=1e-3)

    @property
    def deterministic(self) -> bool:
        """See ``Chain``: whether the steps are fixed. With step control, they depend on x."""
        return self.solver.fixed_steps is not None

    @property
    def nfe(self) -> int:
        """See ``Chain``: of fixed steps, each of which is a solve by itself."""
        _, step, start = METHODS[self.solver.method]
        return (self.solver.fixed_steps or self.solver.max_steps) * (step + start)

    def stretch(self, sde: SDE) -> Number:
        """See ``Chain``. It is 1, because the ODE is solved from T, where the latent is."""
        return 1.0

    def times(self, sde: SDE, eps: Number, pieces: int = 1) -> Times:
        """See ``Chain``: even in the coordinate of the solver; ``pieces`` if no steps are fixed."""
        power, count = self.solver.power, self.solver.fixed_steps or pieces
        return jnp.linspace(sde.T ** (1 / power), eps ** (1 / power), count + 1) ** power

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        """See ``Chain``: one fixed step."""
        solver = dataclasses.replace(self.solver, fixed_steps=1, adjoint="forward")
        return Transition(flow(score, sde, x, s, t, solver).x, jnp.zeros_like(t))

    @checked
    def __call__(
        self, score: Score, sde: SDE, z: Example, key: Key | None, *, eps: Number
    ) -> tuple[Example, Stats]:
        return decode(score, sde, z, eps=eps, solver=self.solver)

    @checked
    def path(
        self, score: Score, sde: SDE, z: Example, key: Key | None, *, eps: Number, frames: Steps
    ) -> tuple[Frames, Times]:
        """See ``Sampler``.

        The frames are evenly spaced in the coordinate of the solver. If it has fixed steps, the
        frames are the nearest of these steps.
        """
        sde.check_time(eps)
        z = in_full_precision(z)
        times = self.times(sde, eps, frames - 1)
        solver = dataclasses.replace(self.solver, fixed_steps=self.solver.fixed_steps and 1)

        def piece(x: Example, ends: tuple[Scalar, Scalar]) -> tuple[Example, Example]:
            x = flow(score, sde, x, *ends, solver).x
            return x, x

        _, path = jax.lax.scan(piece, z, (times[:-1], times[1:]))
        return frames_of(z, path, times, frames)
