"""Sums over the pixels of an image, forward and in gradients, in an order that suits the CPU.

    s[n, c] = sum_p x[n, p, c]            the gradient of x[n, p, c] + v[n, c] in v is such a sum

XLA's code for CPU takes the sum channel by channel, against the order of memory, at a third to a
fifth of the rate at which it adds images. Here a large image's parts are added to each other first,
and what is summed against the order of memory is an eighth. The gradient's sum is written as the
map from v to the image, which JAX transposes, so that every mode of differentiation stands.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from sbml.platform import one_cpu
from sbml.types import Array

Shape = tuple[int, ...]

# Pixels of an image from where on parts gain: at 16x16 they cost as much, and time to compile.
LARGE = 1024


def moments(x: Array) -> tuple[Array, Array]:
    """Mean and mean square over the pixels of ``x (n, h, w, c)``: two of ``(n, c)``."""
    return _moments(x) if _pays(x) else _plain_moments(x)


def affine(x: Array, a: Array, b: Array) -> Array:
    """``a x + b`` at every pixel of ``x (n, h, w, c)``, for ``a, b (n, c)``."""
    if _pays(x):
        # Materialised: the sums of a gradient would recompute it for each of the image's parts.
        return materialise(x * _spread(a, x.shape) + _spread(b, x.shape))
    return x * _everywhere(a, x.shape) + _everywhere(b, x.shape)


@jax.custom_jvp
def materialise(x: Array) -> Array:
    """``x``, whose gradient is computed once and then read by all that use it.

    On CPU, XLA recomputes what is cheap for each of its uses. The gradient of a residual sum is
    cheap, given the one of the next sum: all the sums down to the output were recomputed at each.
    It recomputes nothing across a condition, so here is one: a NaN in ``x`` makes its gradient NaN.
    """
    return x


@materialise.defjvp
def _(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    nan = jnp.isnan(x[(0,) * x.ndim])
    return x, lax.cond(nan, lambda dx: jnp.nan * dx, lambda dx: dx, dx)


def _pays(x: Array) -> bool:
    return one_cpu() and x.shape[1] * x.shape[2] >= LARGE


def _parts(height: int) -> int:
    return max(k for k in range(1, 9) if height % k == 0)


def _plain_moments(x: Array) -> tuple[Array, Array]:
    return x.mean((1, 2)), jnp.square(x).mean((1, 2))


@jax.custom_jvp
def _moments(x: Array) -> tuple[Array, Array]:
    parts = jnp.split(x, _parts(x.shape[1]), axis=1)
    squares = [jnp.square(part) for part in parts]
    pixels = x.shape[1] * x.shape[2]
    first, second = (sum(p[1:], p[0]).sum((1, 2)) / pixels for p in (parts, squares))
    return first, second


@_moments.defjvp
def _(
    primals: tuple[Array], tangents: tuple[Array]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    return _moments(*primals), jax.jvp(_plain_moments, primals, tangents)[1]


def _everywhere(v: Array, shape: Shape) -> Array:
    return jnp.broadcast_to(v[:, None, None, :], shape)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _spread(v: Array, shape: Shape) -> Array:
    return _everywhere(v, shape)


@_spread.defjvp
def _(shape: Shape, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (v,), (dv,) = primals, tangents
    n, height, *rest = shape
    parts = _parts(height)
    part = _everywhere(dv, (n, height // parts, *rest))
    return _spread(v, shape), jnp.concatenate([part] * parts, axis=1)
