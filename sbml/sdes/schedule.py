"""An SDE from any two functions: x_t = alpha(t) x_0 + sigma(t) z."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from sbml.door import typed
from sbml.scalars import Number
from sbml.sdes._kernel import SDE
from sbml.types import Elementwise, Numbers


@typed
@dataclasses.dataclass(frozen=True)
class Schedule(SDE):
    """The SDE with x_t = alpha(t) x_0 + sigma(t) z; everything else is derived.

        sde = Schedule(lambda t: 1 - t**2, lambda t: t)

    Two schedules are equal, and share compiled functions, only if they have the same function
    objects. So make a schedule once and keep it. The parameters of a function, such as
    ``jax.tree_util.Partial(f, params)``, are leaves of the schedule.

    Attributes:
      alpha: an elementwise function, positive and not increasing on (0, 1); alpha(1) = 0 is
        allowed.
      sigma: an elementwise function, positive on (0, 1]; alpha / sigma must decrease.
      smallest_time: the time at which integrals over time and the ODE start.

    Raises:
      ValueError: ``smallest_time`` is not in (0, 1).
    """

    alpha: Callable[[Elementwise], Elementwise]
    sigma: Callable[[Elementwise], Elementwise]
    smallest_time: Number = dataclasses.field(  # type: ignore[misc]
        default=1e-5, kw_only=True, metadata={"static": True}
    )

    def __post_init__(self) -> None:
        if not 0 < self.smallest_time < self.T:
            raise ValueError(f"smallest_time={self.smallest_time}: must lie in (0, {self.T})")

    def mean_coef(self, t: Elementwise) -> Elementwise:
        return _like(self.alpha(t), t)

    def std(self, t: Elementwise) -> Elementwise:
        return _like(self.sigma(t), t)


def _like(value: Numbers | float, t: Elementwise) -> Elementwise:
    """``value``, which may be a constant or an integer, in the shape and precision of ``t``."""
    value = jnp.asarray(value)
    value = value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(jnp.result_type(t))
    return value if value.ndim else jnp.broadcast_to(value, jnp.shape(t))
