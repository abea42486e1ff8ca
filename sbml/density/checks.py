"""Checks what users give to a density, and makes arrays of their data and conditions.

Data are n examples ``x (n, *shape)``, floating-point numbers or integers 0 .. L - 1. A condition is
one for all examples, or one for each; it becomes a pytree of arrays with a row for each example.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Num

from sbml.core import bits
from sbml.core.door import shown
from sbml.core.scalars import is_traced
from sbml.core.types import Array, check_function, optional
from sbml.score import Foreign, NetworkScore
from sbml.sdes import SDE

Examples = Num[np.ndarray, "n *s"]


def check_sde(sde: SDE, score: Any) -> None:
    """Raise a ValueError if ``sde`` cannot be a constant, or ``score`` was made for another SDE."""
    try:
        hash(sde)
    except TypeError:
        raise ValueError(
            f"sde={sde} contains arrays or lists, so it cannot be a constant of compiled "
            "functions: give floats, as by jax.tree.map(float, sde), or tuples of floats"
        ) from None
    other = optional(score, "sde")
    if not hasattr(other, "log_snr"):  # A score of other code may have another attribute "sde".
        return
    try:
        differs = other != sde
    except (TypeError, ValueError):  # For example, an array and a tuple were compared.
        raise ValueError(
            f"the sde={other} of the score contains arrays, which cannot be compared with the "
            "numbers of Density's sde: give the score an SDE of floats or tuples of floats"
        ) from None
    if differs:
        raise ValueError(
            f"the score was made for sde={other}, and Density has sde={sde}: give both the same SDE"
        )


def is_shape(value: Any) -> bool:
    """Whether ``value`` is the shape of an array, and no pytree of shapes."""
    return isinstance(value, tuple) and all(isinstance(n, int) and n >= 1 for n in value)


def check_condition_shape(shapes: Any) -> None:
    """Raise a ValueError if ``shapes`` is no shape and no pytree of shapes."""
    if not all(map(is_shape, jax.tree.leaves(shapes, is_leaf=is_shape))):
        raise ValueError(
            f"condition_shape is {shown(shapes)}: give a shape such as (3,), or a pytree of "
            "shapes, with sizes of at least 1"
        )


def continuous(x: Any, shape: tuple[int, ...], dtype: Any = None) -> Examples:
    """Floating-point examples ``x (n, *shape)``, in ``dtype`` or JAX's default precision."""
    data = np.asarray(x)
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(
            f"x is of {data.dtype}: give floating-point numbers in the scale of the score, or "
            "integers to bits_per_dim"
        )
    _check_shape(data, shape)
    data = data.astype(dtype or jnp.result_type(float))
    lost = np.flatnonzero(~np.isfinite(data).reshape(len(data), -1).all(axis=1))
    if len(lost):
        raise ValueError(
            f"{len(lost)} of {len(data)} examples have values that are NaN, infinite or too "
            f"large for {data.dtype}: leave them out. Their indices are {some(lost)}"
        )
    return data


def integers(pixels: Any, shape: tuple[int, ...], levels: int | None) -> tuple[Examples, int]:
    """The integers ``pixels (n, *shape)``, and the number of their ``levels``."""
    data = np.asarray(pixels)
    if levels is None:
        raise ValueError(
            "levels=None: bits/dim are defined for integers only; give Density the number of "
            "their levels"
        )
    bits.check_pixels(data, levels)
    _check_shape(data, shape)
    return data, levels


def _check_shape(data: np.ndarray, shape: tuple[int, ...]) -> None:
    if data.ndim == 0 or data.shape[1:] != shape or not len(data):
        expected = "".join(f", {size}" for size in shape)
        raise ValueError(f"data of shape {data.shape}: give (n{expected}) with n at least 1")


def conditions(condition: Any, batch: tuple[int, ...], shapes: Any, score: Any) -> Any:
    """The conditions of all examples of ``batch``, a pytree of arrays ``(n, ...)``; or None.

    Args:
      condition: one for all examples, or one for each along leading axes.
      batch: the sizes of these axes.
      shapes: the shape of each array of one condition, or a pytree of their shapes.
      score: the score, which must take a condition if there is one.
    """
    if condition is None and shapes != ():
        raise ValueError(
            f"condition=None, but condition_shape={shapes}: give one condition of this shape for "
            "all examples, or one for each"
        )
    more = () if condition is None else ("condition",)
    if isinstance(score, NetworkScore) and isinstance(score.how, Foreign):
        check_function(score.how.network, "network", "x", "t", *more)
    elif condition is None or not optional(score, "given"):
        check_function(score, "score", "x", "t", "key", *more)
    if condition is None:
        return None
    if is_shape(shapes):
        condition, shape = as_arrays(condition), shapes
        shapes = jax.tree.map(lambda _: shape, condition)

    def each(leaf: Any, shape: tuple[int, ...]) -> Array:
        leaf = as_arrays(leaf)
        try:
            array = jnp.asarray(leaf)
        except (TypeError, ValueError):  # JAX raises either, by the type of the leaf.
            raise ValueError(f"condition is {shown(leaf)}: give arrays of numbers") from None
        if array.shape not in (shape, (*batch, *shape)):
            raise ValueError(
                f"condition of shape {array.shape}: give one for all examples, {shape}, or one "
                f"for each, {(*batch, *shape)}; condition_shape is the shape of one"
            )
        known = jnp.issubdtype(array.dtype, jnp.floating) and not is_traced(leaf)
        if known and np.isnan(np.asarray(leaf)).any():
            raise ValueError("condition has a NaN: give numbers")
        return jnp.broadcast_to(array, (*batch, *shape)).reshape(-1, *shape)

    structure: Any
    flat, structure = jax.tree.flatten(shapes, is_leaf=is_shape)
    try:
        leaves = structure.flatten_up_to(condition)
    except ValueError:
        found = jax.tree.structure(condition)
        raise ValueError(
            f"condition is the pytree {found}: give one like condition_shape={shapes}"
        ) from None
    return jax.tree.unflatten(structure, map(each, leaves, flat))


def as_arrays(condition: Any) -> Any:
    """``condition`` with lists of numbers as arrays, because JAX takes them for pytrees."""

    def each(part: Any) -> Any:
        try:
            return np.asarray(part) if _is_numbers(part) else part
        except ValueError:
            raise ValueError(f"condition is {shown(part)}: give lists of one length") from None

    return jax.tree.map(each, condition, is_leaf=_is_numbers)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(leaf, int | float | np.number) for leaf in jax.tree.leaves(value)
    )


def count(conditions: Any) -> int:
    """The number of conditions along the leading axis of a pytree."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(conditions)}
    if len(sizes) != 1 or sizes <= {(), (0,)}:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(conditions)]
        raise ValueError(
            f"conditions of shapes {shapes}: give arrays with the conditions along a leading axis "
            "of one size, at least 1"
        )
    return int(sizes.pop()[0])


def probabilities(prior: Any, count: int) -> np.ndarray:
    """The ``prior (count,)`` of that many conditions; equal probabilities if it is None."""
    if prior is None:
        return np.full(count, 1 / count)
    found = np.asarray(prior, float)
    if found.shape != (count,) or not np.all(found > 0) or not np.isclose(found.sum(), 1):
        raise ValueError(f"prior={prior}: give {count} positive probabilities whose sum is 1")
    return found


def some(indices: np.ndarray) -> str:
    """The first ten of ``indices`` as text."""
    shown = ", ".join(map(str, indices[:10]))
    return shown + (", ..." if len(indices) > 10 else "")
