"""The convolution that keeps an image's size, and its gradient in the kernel.

    y[n, p] = sum_a x[n, p + a] K[a]           dL/dK[a] = sum_{n, p} x[n, p + a]^T dL/dy[n, p]

XLA's code for CPU takes the sum over n and p as a convolution with the batch as its channels: it
transposes x and dL/dy for that and, where images are large, runs on one thread at a tenth to a
third of the forward pass's rate, so that half of a training step goes there. The same sum over
blocks of few images, which the cache holds, is one matrix product for each row of the kernel. JAX
transposes ``_by_rows`` to it: the blocks are written as the map from dK to dy, and every mode of
differentiation stands.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from sbml.types import Array

# Pixels of a block: 0.5 MB at 64 channels.
BLOCK = 2048
# Pixels of an image from where on blocks gain: at 8x8 they cost as much, and time to compile.
LARGE = 256


def one_cpu() -> bool:
    """Whether all is computed by one CPU device, for which some gradients are written anew."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def convolve(x: Array, kernel: Array) -> Array:
    """``x (n, h, w, c)`` with ``kernel (k, k, c, c_out)``, k odd, on zeros beyond the border.

    The kernel's gradient is XLA's own, but for large images in float32 or float64 on a single CPU
    device. (With several, each block would have to be gathered from all of them.)
    """
    large = x.shape[1] * x.shape[2] >= LARGE
    if large and one_cpu() and x.dtype in (jnp.float32, jnp.float64):
        return _convolve(x, kernel)
    return _xla(x, kernel)


def _xla(x: Array, kernel: Array) -> Array:
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_jvp
def _convolve(x: Array, kernel: Array) -> Array:
    return _xla(x, kernel)


@partial(_convolve.defjvp, symbolic_zeros=True)
def _(
    primals: tuple[Array, Array], tangents: tuple[Array | SymbolicZero, Array | SymbolicZero]
) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve(x, kernel)
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else _convolve(dx, kernel)
    return y, dy if isinstance(dkernel, SymbolicZero) else dy + _by_blocks(x, dkernel)


def _by_blocks(x: Array, kernel: Array) -> Array:
    """``_by_rows`` of a few images at a time, each block taken from ``x`` when it is wanted."""
    n, h, w, _ = x.shape
    size = min(n, max(1, BLOCK // (h * w)))

    @jax.checkpoint
    def block(i: Array, x: Array, kernel: Array) -> Array:
        return _by_rows(lax.dynamic_slice_in_dim(x, i * size, size), kernel)

    _, blocks = lax.scan(lambda _, i: (None, block(i, x, kernel)), None, jnp.arange(n // size))
    y = blocks.reshape(-1, h, w, kernel.shape[-1])
    if n % size == 0:
        return y
    return jnp.concatenate([y, _by_rows(x[-(n % size) :], kernel)])


def _by_rows(x: Array, kernel: Array) -> Array:
    """The convolution, as one matrix product for each row of the kernel.

    A product serves the whole row of the kernel: its columns' results are then shifted and added.
    """
    n, h, w, c = x.shape
    k, features = len(kernel), kernel.shape[-1]
    border = k // 2
    rows = kernel.swapaxes(1, 2).reshape(k, c, k * features)
    padded = jnp.pad(x, [(0, 0), (border, border), (0, 0), (0, 0)])
    products = [padded[:, a : a + h].reshape(-1, c) @ rows[a] for a in range(k)]
    columns = sum(products[1:], products[0]).reshape(n, h, w, k * features)
    shifted = [
        lax.pad(
            column,
            jnp.zeros((), x.dtype),
            [(0, 0, 0), (0, 0, 0), (border - b, b - border, 0), (0, 0, 0)],
        )
        for b, column in enumerate(lax.split(columns, [features] * k, axis=3))
    ]
    return sum(shifted[1:], shifted[0])
