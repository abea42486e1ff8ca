"""A change of variables: the score belongs to x, and the data are y = f(x).

    log p(y) = log p(x) + log |det df^-1/dy|,      x = f^-1(y)

A transform f is a bijection of one example with the methods ``forward`` (or ``transform``) and
``inverse_and_log_det``, as in distrax and flowjax. The functions of this file also take None for
the identity. It is computed :func:`in_float64`, because data such as dates in seconds differ only
in digits that float32 does not have. Functions that JAX traces cannot do this: there, neighbours of
float32 must be closer than ``SPACING`` in x.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core import pytrees
from sbml.core.door import shown
from sbml.core.types import Array

SPACING = 1e-3  # x is about one unit wide, so this changes log p by about as much, in nats


def forward(f: Any, x: Array) -> Array:
    """The data y = f(x) of ``x (n, *s)``."""
    return x if f is None else jax.vmap(getattr(f, "forward", None) or f.transform)(x)


def inverse(f: Any, y: Array) -> tuple[Array, Array]:
    """x ``(n, *s)`` of the data ``y (n, *s)``, and log |det df^-1/dy| ``(n,)``.

    If y is finite but x is not, y is outside of the range of f, where the density is 0: x is 0 and
    log |det df^-1/dy| is -inf.

    Raises:
      ValueError: as :func:`check`.
    """
    if f is None:
        return y, jnp.zeros(len(y))
    x, log_det = jax.vmap(f.inverse_and_log_det)(y)
    check(f, y)
    log_det = log_det.sum(axis=tuple(range(1, log_det.ndim)))
    inside, known = (jnp.isfinite(a).all(axis=tuple(range(1, a.ndim))) for a in (x, y))
    outside = known & ~inside
    x = jnp.where(outside.reshape(-1, *[1] * (x.ndim - 1)), 0, x)
    return x, jnp.where(outside, -jnp.inf, log_det)


def in_float64(function: Callable[..., Any], f: Any, data: np.ndarray) -> Any:
    """``function(f, data)`` as NumPy arrays in float64, for :func:`forward` and :func:`inverse`."""

    def exact(leaf: Any) -> Any:
        is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return np.asarray(leaf, np.float64) if is_float else leaf

    with jax.enable_x64(True):
        found = function(jax.tree.map(exact, f), jnp.asarray(data, jnp.float64))
        return jax.tree.map(np.asarray, found)


def exactly(function: Callable[..., Any], f: Any, data: Any) -> Any:
    """``function(f, data)`` :func:`in_float64`. If ``f`` or ``data`` are traced by JAX, it is
    computed in JAX's default precision.

    Raises:
      ValueError: in this case, as :func:`check_spacing`.
    """
    if f is None:
        return function(f, data)
    if isinstance(data, jax.core.Tracer) or isinstance(
        _spacing(f, data.shape[1:]), jax.core.Tracer
    ):
        check_spacing(f, data.shape[1:])
        return function(f, jnp.asarray(data, jnp.result_type(float)))
    return in_float64(function, f, data)


def _spacing(f: Any, shape: tuple[int, ...]) -> Array:
    """How far apart in x, in the largest entry, are f(0) and its next larger neighbours."""
    y = forward(f, jnp.zeros((1, *shape)))[0]
    here, above = (f.inverse_and_log_det(at)[0] for at in (y, jnp.nextafter(y, jnp.inf)))
    return jnp.max(jnp.abs(above - here))


def check_spacing(f: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if JAX's default precision is too coarse for data f(x) of this shape."""

    def check(spacing: Any) -> None:
        if spacing > SPACING:
            raise ValueError(
                f"transform={type(f).__name__}: inside jit, grad or vmap its data are in float32, "
                f"whose neighbours are {spacing:.2g} apart in x, too coarse for log p: call this "
                'outside of them, or set jax.config.update("jax_enable_x64", True)'
            )

    if f is not None:
        pytrees.when_known(check, _spacing(f, shape))


def check_methods(f: Any, shape: tuple[int, ...]) -> None:
    """Raise a ValueError if ``f`` does not have the methods of a transform of examples of this
    shape, or if they return something else. They are traced, and not run."""
    names = ["forward" if hasattr(f, "forward") else "transform", "inverse_and_log_det"]
    if isinstance(f, type) or not all(callable(getattr(f, name, None)) for name in names):
        raise ValueError(
            f"transform is {shown(f)}: give an object with the methods forward (or transform) and "
            "inverse_and_log_det"
        )
    one = jax.ShapeDtypeStruct(shape, jnp.result_type(float))

    def of_one(name: str) -> Any:
        try:
            return jax.eval_shape(getattr(f, name), one)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise ValueError(
                f"transform={type(f).__name__}: {name} of an example of shape {shape} failed with "
                f"{reason}: correct it, or the shape"
            ) from error

    y, pair = map(of_one, names)
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not hasattr(pair[1], "shape"):
        raise ValueError(
            f"transform={type(f).__name__}: inverse_and_log_det returned {shown(pair)}: return "
            "x and log |det df^-1/dy|"
        )
    for name, found in zip(names, (y, pair[0]), strict=True):
        if getattr(found, "shape", None) != shape:
            raise ValueError(
                f"transform={type(f).__name__}: {name} of an example of shape {shape} returned "
                f"{shown(found)}: return an array of the same shape"
            )


def check(f: Any, y: Array) -> None:
    """Raise a ValueError if ``f`` is no bijection at the first of the data ``y (n, *s)``, or its
    log-determinant is wrong there. Tracers are not checked."""
    if f is None or isinstance(y, jax.core.Tracer):
        return
    name, dims = type(f).__name__, math.prod(y.shape[1:])
    for one in y[:2]:
        x, log_det = f.inverse_and_log_det(one)
        if not bool(jnp.all(jnp.isfinite(one)) & jnp.all(jnp.isfinite(x))):
            continue  # log p is NaN, or infinite.
        # The data may be 0 where f(0), such as a mean, is not.
        again, centre = forward(f, jnp.stack([x, jnp.zeros_like(x)]))
        error = jnp.max(jnp.abs(again - one))
        if not error <= 1e-3 * jnp.maximum(jnp.max(jnp.abs(one)), jnp.max(jnp.abs(centre))):
            raise ValueError(
                f"transform={name}: forward(inverse(y)) differs from y by {error:.2g}, so "
                "inverse_and_log_det is not the inverse of forward at this y"
            )
        if dims > 64:
            continue
        slopes = jax.jacfwd(lambda y: f.inverse_and_log_det(y)[0].ravel())(one)
        expected = jnp.linalg.slogdet(slopes.reshape(dims, -1))[1]
        if not jnp.abs(jnp.sum(log_det) - expected) <= 1e-3 * (1 + jnp.abs(expected)):
            raise ValueError(
                f"transform={name}: its log-determinant is {jnp.sum(log_det):.4g}, but that of "
                f"the derivative of its inverse is {expected:.4g}: return log |det df^-1/dy|"
            )
