"""The inverse of a decreasing function of time, by bisection over floating-point numbers.

Read as integers, the bits of positive floats have the same order as the floats. So halving
intervals of these integers ends at two neighbouring floats: for floats in (0, 1] after 30 steps in
float32 and 62 in float64. The result has full relative accuracy at every scale; halving intervals
of t would lose it near 0.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core.types import Array, Elementwise

Function = Callable[[Elementwise], Elementwise]


def slope(f: Function, t: Elementwise) -> Elementwise:
    """df/dt of an elementwise function ``f``, with the shape of ``t``."""
    t = jnp.asarray(t)
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def inverse(f: Function, y: Elementwise, last: float) -> Elementwise:
    """The largest float t in (0, ``last``] with f(t) >= y, elementwise, with the shape of ``y``.

    ``f`` is elementwise and decreasing. For y above f's range the result is the smallest normal
    float, for y below it ``last``, and for NaN it is NaN. The derivative is that of the inverse
    function: with y = f(t; theta), dt = (dy - df/dtheta dtheta) / (df/dt). Second derivatives are
    not supported: they are wrong, without an error.
    """
    y = jnp.asarray(y)
    y = y.astype(jnp.result_type(y, float))  # Floats keep their precision, integers become floats.
    t = jax.lax.stop_gradient(_bisect(f, y, last))
    gap, rate = f(t) - y, jax.lax.stop_gradient(slope(f, t))
    regular = jnp.isfinite(gap) & jnp.isfinite(rate) & (rate != 0)
    gap = jnp.where(regular, gap, 0)
    # This step is 0. It is there for its derivative, which becomes that of t.
    step = (gap - jax.lax.stop_gradient(gap)) / jnp.where(regular, rate, 1)
    # The SDE's parameters may be more precise than the argument.
    return jnp.where(jnp.isnan(y), y, t - step.astype(y.dtype))


def _bisect(f: Function, y: Elementwise, last: float) -> Elementwise:
    integer = jnp.dtype(f"int{8 * y.dtype.itemsize}")
    ends = np.asarray([jnp.finfo(y.dtype).tiny, last]).astype(y.dtype).view(integer)
    # In each interval, f >= y at the lower end and f < y at the upper end.
    low, high = (jnp.full(y.shape, end, integer) for end in (ends[0], ends[1] + 1))

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        above = f(jax.lax.bitcast_convert_type(middle, y.dtype)) >= y
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    steps = math.ceil(math.log2(int(ends[1]) + 1 - int(ends[0])))
    low, _ = jax.lax.fori_loop(0, steps, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, y.dtype)
