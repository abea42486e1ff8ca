"""A speed-up for a single CPU device: gradients at residual sums are stored, not recomputed.

On CPU, XLA computes a cheap result again in each operation that reads it. The gradient at a
residual sum follows cheaply from the gradient at the next sum, so XLA would recompute, in the
gradient of every block, the gradients at all sums between that block and the output. XLA recomputes
nothing across a conditional (``lax.cond``), so the gradient is passed through one. Without it a
training step of a network for 32x32 photos takes 1.9 times as long (benchmarks/README.md).
"""

import jax
import jax.numpy as jnp
from jax import lax

from sbml.platform import one_cpu
from sbml.types import Array


def materialise(x: Array) -> Array:
    """Return ``x`` unchanged; its gradient is computed once for all operations that read it."""
    return _materialise(x) if one_cpu() else x


@jax.custom_jvp
def _materialise(x: Array) -> Array:
    return x


@_materialise.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """XLA removes a conditional whose condition is constant, so the condition depends on ``x``. It
    changes the gradient only if the first entry of ``x`` is NaN: then the gradient is NaN too."""
    (x,), (dx,) = primals, tangents
    nan = jnp.isnan(x[(0,) * x.ndim])
    return _materialise(x), lax.cond(nan, lambda dx: jnp.nan * dx, lambda dx: dx, dx)
