"""Fourier features: sines and cosines of the input's values.

    x  ->  [x, sin(pi f x) for each frequency f, cos(pi f x) for each frequency f]

The bin of the integer k, one of L levels, has its centre at x = (2 k + 1) / L - 1; neighbouring
centres are 2 / L apart. A feature of frequency L repeats in every bin and shows where x lies inside
its bin. A feature of frequency L / 2 repeats in every second bin and distinguishes even k from odd
k, and so on: frequency L / 2^j shows the j-th bit of k. A network that must predict noise far
smaller than a bin needs these digits, but x itself hardly shows them.

Reference: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, section 4.5.
"""

import math

import jax.numpy as jnp

from sbml.types import Array


def frequencies(levels: int, count: int = 2, scale: float = 1.0) -> tuple[float, ...]:
    """Frequencies ``scale`` L / 2^j for j = count - 1 ... 0, in rising order, for ``fourier``.

    The two frequencies for 256 levels are (128, 256), that is, VDM's sin(2 pi 2^n x) for n = 6, 7.
    If the network sees x / d in place of x, as with the parameterization "preconditioned" at small
    noise, give the data's standard deviation d as the ``scale``.

    Raises:
      ValueError: ``levels`` is below 2 or ``count`` is below 1.
    """
    if levels < 2 or count < 1:
        raise ValueError(
            f"levels={levels}, count={count}: choose levels of at least 2 and a count of at least 1"
        )
    return tuple(scale * levels / 2**j for j in reversed(range(count)))


def features(x: Array, fourier: tuple[float, ...]) -> Array:
    """``x (..., c)`` with its features for the frequencies ``fourier (k,)``: (..., c (1 + 2 k)).

    The last axis holds x, then all sines, then all cosines. Among the sines, and among the cosines,
    those of one channel stand together, in the order of the frequencies. Without frequencies the
    result is ``x``. The arithmetic is in the dtype of ``x``: the angles are large, so convert to
    bfloat16 after this function and not before it.
    """
    if not fourier:
        return x
    scale = math.pi * jnp.asarray(fourier, x.dtype).reshape((1,) * x.ndim + (-1,))
    angle = (x[..., None] * scale).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)


def check(field: str, fourier: tuple[float, ...]) -> None:
    """Raise a ValueError unless the frequencies are positive."""
    if not all(f > 0 for f in fourier):
        raise ValueError(f"{field}={fourier}: choose frequencies above 0, or () for none")
