"""What the networks do for a single CPU device only: gradients that are stored, not recomputed.

XLA's code for CPU computes a cheap result again in each operation that reads it. The gradient at a
residual sum is cheap, given the one at the next sum, so every block's gradient would recompute all
sums between itself and the output. XLA recomputes nothing across a condition, so the gradient goes
through one: without it a training step of ``configs/photos_vp.py`` takes 1.9 times as long
(benchmarks/README.md).
"""

import jax
import jax.numpy as jnp
from jax import lax

from sbml.platform import one_cpu
from sbml.types import Array


def materialise(x: Array) -> Array:
    """``x``, whose gradient is computed once for all operations that read it."""
    return _materialise(x) if one_cpu() else x


@jax.custom_jvp
def _materialise(x: Array) -> Array:
    return x


@_materialise.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The condition must be one that XLA cannot decide: where ``x`` is NaN, so is its gradient."""
    (x,), (dx,) = primals, tangents
    nan = jnp.isnan(x[(0,) * x.ndim])
    return _materialise(x), lax.cond(nan, lambda dx: jnp.nan * dx, lambda dx: dx, dx)
