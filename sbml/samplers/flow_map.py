"""Flow maps with two times: x_r = Phi(x_t, t, r) for t > r, a step of any length in one evaluation.

MeanFlow, shortcut and distilled models are such maps: Phi(x, t, r) = x - (t - r) u(x, t, r) with a
network u for the mean velocity between the two times. A chain of them is a sampler without noise,
so the density of its samples is exact, however well the map follows an ODE.
"""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from sbml.core.door import typed
from sbml.core.scalars import Number, is_traced
from sbml.core.types import Array, Example, Scalar, Score, half_precision
from sbml.samplers._grid import FixedSteps, Times
from sbml.samplers.corrector import Corrector, NoCorrector
from sbml.samplers.density import Transition
from sbml.sdes import SDE


@typed
@dataclasses.dataclass(frozen=True)
class Map(FixedSteps):
    """The steps x <- ``f(x, t, r)`` for neighbours t > r of ``grid``. They use no score.

    Attributes:
      f: a function of one example ``(*s)`` and two scalar times, which gives x at time r ``(*s)``.
      grid: times that decrease from the SDE's T to that of the samples, which may be 0. For
        ``Density.gap`` it is the ``eps`` of the density, because there the ODE ends.
      corrector: as in ``FixedSteps``; it uses the score, and a sampler with one has no density.
    """

    steps: ClassVar[int]  # type: ignore[misc]
    spacing: ClassVar[str]  # type: ignore[misc]
    corrector: Corrector = dataclasses.field(default=NoCorrector(), kw_only=True)
    deterministic: ClassVar[bool] = True

    f: Callable[..., Array] = dataclasses.field(repr=False)  # type: ignore[misc]
    grid: tuple[float, ...] = (1.0, 0.0)

    def __post_init__(self) -> None:
        ends = list(zip(self.grid, self.grid[1:], strict=False))
        object.__setattr__(self, "steps", len(ends))
        if not ends or any(t <= r for t, r in ends):
            raise ValueError(f"grid={self.grid}: give times that decrease, such as (1.0, 0.5, 0.0)")

    def stretch(self, sde: SDE) -> Number:
        """See ``Chain``. It is 1, because the grid begins at T, where the latent is."""
        return 1.0

    def times(self, sde: SDE, eps: Number) -> Times:
        ends = self.grid[0], self.grid[-1]
        if not is_traced(sde.T, eps) and not (ends[0] == sde.T and 0 <= ends[1] <= eps):
            raise ValueError(f"grid={self.grid}: give times from T={sde.T} down to 0 or eps={eps}")
        return jnp.asarray(self.grid, float)

    def transition(self, score: Score, sde: SDE, x: Example, s: Scalar, t: Scalar) -> Transition:
        y, half = self.f(x, s, t), half_precision(self.f, x, s, t)
        if half or jnp.shape(y) != x.shape:
            raise ValueError(
                f"f of samplers.Map returned shape {jnp.shape(y)} for {x.shape}, computed in "
                f"{half or x.dtype}: return x at time r, of the shape of x, computed in float32"
            )
        return Transition(y, jnp.zeros_like(t))
