"""A convolution and its bias, and their gradients in the parameters.

    y[n, p] = sum_a x[n, p + a] K[a]           dL/dK[a] = sum_{n, p} x[n, p + a]^T dL/dy[n, p]

XLA's code for CPU takes the sum over n and p as a convolution with the batch as its channels: it
transposes x and dL/dy for that and runs on one thread, at a quarter to a third of the forward
pass's rate, so that half of a training step goes there. The same sum is one matrix product for each
row of the kernel. JAX transposes ``_by_rows`` to it: the products are written as the map from dK to
dy, and every mode of differentiation stands.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sbml.platform import one_cpu
from sbml.types import Array

Pair = tuple[Array, Array]
Tangents = tuple[Array | SymbolicZero, Array | SymbolicZero]

# Pixels of an image from where on products gain: at 8x8 they cost as much, and time to compile.
LARGE = 256

# Parts of a batch whose products are summed in a kernel's gradient.
BLOCKS = 8


def convolve(x: Array, kernel: Array, stride: int = 1) -> Array:
    """``x (n, h, w, c)`` with ``kernel (k, k, c, c_out)``, on zeros beyond the border ("SAME").

    The kernel's gradient is XLA's own, but for a stride of 1, an odd k and large images in float32
    or float64 on a single CPU device.
    """
    large = x.shape[1] * x.shape[2] >= LARGE and stride == 1 and len(kernel) % 2
    if large and one_cpu() and x.dtype in (jnp.float32, jnp.float64):
        return _convolve(x, kernel)
    return _xla(x, kernel, stride)


def _xla(x: Array, kernel: Array, stride: int = 1) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_jvp
def _convolve(x: Array, kernel: Array) -> Array:
    return _xla(x, kernel)


@partial(_convolve.defjvp, symbolic_zeros=True)
def _(primals: Pair, tangents: Tangents) -> Pair:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve(x, kernel)
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else _convolve(dx, kernel)
    return y, dy if isinstance(dkernel, SymbolicZero) else dy + _by_rows(x, dkernel)


def _by_rows(x: Array, kernel: Array) -> Array:
    """The convolution, as one matrix product for each row of the kernel.

    A product serves the whole row: its columns' results are then shifted and added. It is taken in
    ``BLOCKS`` parts of the batch, whose sum is the transpose's: shorter products are faster.
    """
    n, h, w, c = x.shape
    k, features = len(kernel), kernel.shape[-1]
    border, blocks = k // 2, math.gcd(BLOCKS, n)
    rows = kernel.swapaxes(1, 2).reshape(k, 1, c, k * features)
    rows = jnp.broadcast_to(rows, (k, blocks, *rows.shape[2:]))
    beyond = jnp.zeros((n, border, w, c), x.dtype)
    padded = jnp.concatenate([beyond, x, beyond], axis=1)
    seen = [x if a == border else padded[:, a : a + h] for a in range(k)]
    products = [seen[a].reshape(blocks, -1, c) @ rows[a] for a in range(k)]
    columns = sum(products[1:], products[0]).reshape(n, h, w, k * features)
    columns = jnp.pad(columns, [(0, 0), (0, 0), (border, border), (0, 0)])
    shifted = [columns[:, :, b : b + w, b * features : (b + 1) * features] for b in range(k)]
    return sum(shifted[1:], shifted[0])


def add_bias(x: Array, bias: Array) -> Array:
    """``x (..., c) + bias (c,)``.

    The bias's gradient is a sum over all but the last axis, which XLA's code for CPU takes against
    the order of memory: on a single CPU device it is a product with ones, at a third of the cost.
    """
    return _add_bias(x, bias) if one_cpu() else _plus(x, bias)


def _plus(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + (-1,))


@jax.custom_jvp
def _add_bias(x: Array, bias: Array) -> Array:
    return _plus(x, bias)


@partial(_add_bias.defjvp, symbolic_zeros=True)
def _(primals: Pair, tangents: Tangents) -> Pair:
    (x, bias), (dx, dbias) = primals, tangents
    y = _plus(x, bias)
    dy = jnp.zeros_like(x) if isinstance(dx, SymbolicZero) else dx
    return y, dy if isinstance(dbias, SymbolicZero) else dy + _by_ones(x.shape, dbias)


def _by_ones(shape: tuple[int, ...], bias: Array) -> Array:
    """``bias (c,)`` everywhere in ``shape (..., c)``, as a product."""
    ones = jnp.ones((math.prod(shape[:-1]), 1), bias.dtype)
    return (ones @ bias[None]).reshape(shape)
