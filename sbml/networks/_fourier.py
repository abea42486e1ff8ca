"""Sines and cosines as features: of the values of an input, and of the noise level.

    x  ->  [x, sin(pi f x) for each frequency f, cos(pi f x) for each frequency f]

The integers k of L levels have their bins' centres at x = (2 k + 1) / L - 1, 2 / L apart. A feature
of frequency L repeats with every bin and tells where in its bin x lies; one of L / 2 repeats with
every second bin and tells even k from odd, and L / 2^j tells the j-th bit of k. A network that must
predict a noise far smaller than a bin needs these digits, which x itself hardly shows.

Reference: Kingma et al., "Variational Diffusion Models", NeurIPS 2021, section 4.5.
"""

import math

import jax.numpy as jnp

from sbml.types import Array


def frequencies(levels: int, count: int = 2, scale: float = 1.0) -> tuple[float, ...]:
    """``scale`` times L / 2^j for j = count - 1 ... 0, in rising order: values of ``fourier``.

    Two for 256 levels are (128, 256): VDM's sin(2 pi 2^n x) for n = 6, 7. Where the network does
    not see x but x / d, as with the parameterization "preconditioned" at small noise, give the
    data's standard deviation d as the ``scale``.

    Raises:
      ValueError: for fewer than two levels or no frequency.
    """
    if levels < 2 or count < 1:
        raise ValueError(f"levels={levels}, count={count}: need levels of at least 2, count of 1")
    return tuple(scale * levels / 2**j for j in reversed(range(count)))


def features(x: Array, fourier: tuple[float, ...]) -> Array:
    """``x (..., c)`` with its features for the frequencies ``fourier (k,)``: (..., c (1 + 2 k)).

    First x, then all sines, then all cosines; of both those of a channel are neighbours, in the
    order of the frequencies. Without frequencies it is ``x`` itself. Computed in the dtype of
    ``x``: the angles are large, so cast to bfloat16 afterwards.
    """
    if not fourier:
        return x
    scale = math.pi * jnp.asarray(fourier, x.dtype).reshape((1,) * x.ndim + (-1,))
    angle = (x[..., None] * scale).reshape(*x.shape[:-1], -1)
    return jnp.concatenate([x, jnp.sin(angle), jnp.cos(angle)], axis=-1)


def check(field: str, fourier: tuple[float, ...]) -> None:
    """Raise a ValueError unless the frequencies are positive."""
    if not all(f > 0 for f in fourier):
        raise ValueError(f"{field}={fourier}: choose frequencies above 0, or none")
