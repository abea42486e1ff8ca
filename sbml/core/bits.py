"""From integers of L levels to real numbers in [-1, 1), and from nats to bits/dim.

An integer k in {0, ..., L-1} has the bin [k, k+1) / L, which is scaled to [-1, 1]:

    x = 2 (k + u) / L - 1,    u in [0, 1).

A density p of x gives the density p(x) (2 / L)^d of k + u, hence

    bits/dim = (-log p(x) + d log(L / 2)) / (d log 2).
"""

import math
from typing import Annotated, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from sbml.core import scalars
from sbml.core.door import checked, condition, typed
from sbml.core.scalars import at_least, between
from sbml.core.types import Anything, Array, Elementwise, Numbers

Real = Float[Array, "..."]

Nats = TypeVar("Nats", float, Array, np.ndarray)

LOG2 = math.log(2.0)
MOST_LEVELS = 2**16  # With more levels, too few float32 numbers lie in a bin.
Levels = Annotated[int, between(2, MOST_LEVELS)]
Shape = Annotated[
    tuple[int, ...],
    condition("of positive sizes, such as (28, 28, 1)", lambda shape: min(shape, default=1) >= 1),
]
WithoutNaN = Annotated[
    Elementwise, condition("without NaN", lambda x: not np.any(np.isnan(np.asarray(x))))
]
# NaN passes, and becomes NaN.
Fraction = Annotated[
    Numbers | float,
    condition("in [0, 1]", lambda u: not np.any((np.asarray(u) < 0) | (np.asarray(u) > 1))),
]


def check_pixels(pixels: Anything | np.ndarray, levels: int) -> None:
    """Raise a ValueError unless ``pixels`` are integers 0 .. levels - 1. Values are not checked
    inside ``jit``."""
    if not jnp.issubdtype(pixels.dtype, jnp.integer):
        raise ValueError(
            f"pixels are {pixels.dtype}: give an array of integers (bound takes real x)"
        )
    if scalars.is_traced(pixels) or not pixels.size:
        return
    values = np.asarray(pixels)  # By NumPy: JAX would trace its operations inside ``jit``.
    least, largest = values.min(), values.max()
    if least < 0 or largest >= levels:
        raise ValueError(f"pixels lie in {least} .. {largest}: give integers 0 .. {levels - 1}")


@typed
def dims(shape: Shape) -> int:
    """The number of dimensions of one example of ``shape``."""
    return math.prod(shape)


@checked
def to_model(pixels: Numbers | float, u: Fraction, levels: Levels) -> Real:
    """x = 2 (pixels + u) / levels - 1 in [-1, 1), for ``u`` in [0, 1); any shapes that broadcast.

    ``u`` is limited to at most 1 - 2^-15, or in float32 to 1 - 2^-23 L if that is less: nearer to
    1, x would be rounded into the next bin. ``pixels`` are numbers in [0, levels - 1] or NaN.
    """
    values = 0 if scalars.is_traced(pixels) else np.asarray(pixels)
    if np.any((values < 0) | (values > levels - 1)):
        least, largest = np.min(values), np.max(values)
        raise ValueError(f"pixels lie in {least:g} .. {largest:g}: give numbers 0 .. {levels - 1}")
    u = jnp.asarray(u, jnp.promote_types(jnp.result_type(pixels, u, 1.0), jnp.float32))
    rounding = min(float(jnp.finfo(u.dtype).eps), 2.0**-23)
    largest = 1 - max(2.0**-15, levels * rounding)
    return (2.0 / levels) * (jnp.asarray(pixels) + jnp.minimum(u, largest)) - 1.0


@checked
def to_pixels(x: WithoutNaN, levels: Annotated[int, between(2, 256)]) -> UInt8[Array, "..."]:
    """The uint8 level whose bin holds ``x``; values outside [-1, 1) go to the nearest level, and
    NaN inside ``jit`` to the last one."""
    edges = to_model(jnp.arange(1, levels), 0.0, levels)
    return jnp.searchsorted(edges, x, side="right").astype(jnp.uint8)


@typed
def scale_nats(shape: Shape, levels: Annotated[int, at_least(2)]) -> float:
    """d log(L / 2), which the change of variables from x to k + u adds to -log p, in nats."""
    return math.prod(shape) * math.log(levels / 2)


def bits_per_dim(nll: Nats, shape: tuple[int, ...], levels: int) -> Nats:
    """Bits/dim of integers from ``nll`` = -log p(x) in nats, for one example's ``shape``."""
    return (nll + scale_nats(shape, levels)) / (dims(shape) * LOG2)


def nats_to_bits(nats: Nats, shape: tuple[int, ...]) -> Nats:
    """Bits/dim of ``nats`` for one example of ``shape``, without a change of scale."""
    return nats / (dims(shape) * LOG2)


@typed
def check_dequantized(x: Numbers, levels: Levels) -> None:
    """Raise a ValueError if every entry of ``x`` lies on the grid 2 k / levels - 1 or
    2 k / (levels - 1) - 1: the density of integers without noise can be arbitrarily large."""
    host = np.asarray(x, np.float64)
    # The tolerance is above the rounding error of k for x of float32.
    tolerance = max(1e-4, levels * 2.0**-22)
    for steps in (levels, levels - 1):
        k = (host + 1) * steps / 2
        if np.all(np.abs(k - np.round(k)) < tolerance):
            raise ValueError(
                f"all values are integers of {levels} levels; dequantize them before a density "
                "estimate (sbml.dequantizers.uniform adds u ~ U[0, 1))"
            )
