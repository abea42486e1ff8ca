"""A score as an argument of a compiled function, so that one program serves all its weights.

``jit`` compiles a function once for each structure of its arguments. Arrays that the function reads
from elsewhere are constants of the compiled program. There are two kinds of scores:

*A score with arrays among its leaves*, such as an Equinox module, an NNX module or
``jax.tree_util.Partial(f, params)``, is split into its arrays, which are arguments, and the rest.

*Any other function* is traced by JAX each time it is given. The arrays that it has read become
arguments, and its operations are the program. So changed weights have an effect, and a program is
compiled only once. Two programs are the same if their texts and the texts of their derivatives with
respect to x are the same. There is an exception: if the function calls another function that is
itself compiled by ``jit``, the arrays that the inner function has read stay constants. If they
change, the program is compiled again.

Weights in half precision among the leaves are converted to float32, with a warning.
"""

import contextlib
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxpr_as_fun

from sbml.core import pytrees
from sbml.core.types import (
    Array,
    Example,
    Key,
    P,
    PyTree,
    Scalar,
    Score,
    T,
    conditioned,
    deterministic,
    equations,
    predictor,
)

Arrays = tuple[Array | np.ndarray, ...]
# A pytree without its arrays: the type and value of each leaf, with None in the place of an array,
# and the structure. It is hashable if the leaves are.
Rest = tuple[tuple[tuple[type, object] | None, ...], jax.tree_util.PyTreeDef]
Shape = jax.ShapeDtypeStruct


def split(tree: PyTree) -> tuple[Arrays, Rest]:
    """The leaves of ``tree`` that are arrays, and the rest."""
    leaves, structure = jax.tree.flatten(tree)
    arrays = tuple(filter(_is_array, leaves))
    others = (None if _is_array(leaf) else (type(leaf), leaf) for leaf in leaves)
    return arrays, (tuple(others), structure)


def joined(arrays: Iterable[object], rest: Rest) -> PyTree:
    """The inverse of :func:`split`; ``arrays`` may also be other objects, one for each array."""
    values, (others, structure) = iter(arrays), rest
    leaves = [next(values) if other is None else other[1] for other in others]
    return jax.tree.unflatten(structure, leaves)


def compiled(f: Callable[P, T], *static: str) -> Callable[P, T]:
    """``f`` compiled by ``jit``; its first argument is a pytree, of which only the arrays are
    traced, and ``static`` are the names of other static arguments."""

    call: Callable[..., T] = f

    def inside(arrays: Arrays, *arguments: PyTree, rest: Rest, **options: PyTree) -> T:
        return call(joined(arrays, rest), *arguments, **options)

    jitted = jax.jit(inside, static_argnames=("rest", *static))

    @functools.wraps(f)
    def outside(tree: PyTree, *arguments: PyTree, **options: PyTree) -> T:
        arrays, rest = split(tree)
        result: T = jitted(arrays, *arguments, rest=rest, **options)
        return result

    outside.jitted = jitted  # type: ignore[attr-defined]
    return cast(Callable[P, T], outside)


@dataclasses.dataclass(frozen=True, repr=False)
class Program:
    """The operations of a function of arrays, without the arrays that it has read.

    Attributes:
      jaxpr: the operations.
      text: a text of the operations and of their derivative. Programs with the same text are equal.
    """

    jaxpr: Jaxpr = dataclasses.field(compare=False)
    text: str

    def __call__(self, constants: Arrays, *arguments: Array) -> list[Array]:
        """The results for ``arguments``, if the function reads ``constants`` as its arrays."""
        results: list[Array] = jaxpr_as_fun(ClosedJaxpr(self.jaxpr, constants))(*arguments)
        return results


@pytrees.register
@dataclasses.dataclass(frozen=True)
class TracedScore:
    """A score as a program and the arrays that it has read, which are the leaves of this pytree.

    Attributes:
      constants: the arrays that the score has read, and those that its ``predictions`` have read.
      score, pair: the programs of the score and of its ``predictions``; ``pair`` is None if it has
        no predictions.
      condition: the condition under which the score is called, or None.
    """

    constants: tuple[Arrays, Arrays]
    score: Program = dataclasses.field(metadata={"static": True})
    pair: Program | None = dataclasses.field(metadata={"static": True})
    condition: PyTree = None

    def __call__(self, x: Example, t: Scalar, key: Key | None = None) -> Example:
        return self.score(self.constants[0], x, t, *jax.tree.leaves(self.condition))[0]

    @property
    def predictions(self) -> Callable[[Example, Scalar], tuple[Example, ...]] | None:
        """The predictions of the score (``sbml.types``), or None if it has none."""
        pair = self.pair
        if pair is None:
            return None
        leaves = jax.tree.leaves(self.condition)
        return lambda x, t: tuple(pair(self.constants[1], x, t, *leaves))

    def given(self, condition: PyTree) -> "TracedScore":
        """The score under ``condition``."""
        return dataclasses.replace(self, condition=condition)


def as_argument(score: Any, shape: tuple[int, ...], condition: PyTree = None) -> Score:
    """``score``, any callable, as the first argument of functions by :func:`compiled`.

    Args:
      score: a score of one example (``sbml.types``).
      shape: the shape of an example.
      condition: one condition, of which only the shapes and types matter, or None.
    """
    arrays, rest = split(score)
    if arrays:
        whole: Score = joined(map(_in_float32, arrays), rest)
        return whole
    conditions, structure = jax.tree.flatten(condition)
    x, t = (jax.ShapeDtypeStruct(s, jnp.result_type(float)) for s in (shape, ()))

    def under(leaves: tuple[Array, ...]) -> Score:
        return conditioned(score, jax.tree.unflatten(structure, leaves) if leaves else None)

    def call(x: Example, t: Scalar, *condition: Array) -> Example:
        return deterministic(under(condition), x, t)

    def both(x: Example, t: Scalar, *condition: Array) -> tuple[Example, Example]:
        pair = predictor(under(condition))
        assert pair is not None
        return pair(x, t)

    program, constants = _traced(call, x, t, *conditions)
    if predictor(score) is None:
        return TracedScore((constants, ()), program, None)
    pair, more = _traced(both, x, t, *conditions)
    return TracedScore((constants, more), program, pair)


def _traced(
    f: Callable[..., PyTree], x: Shape, t: Shape, *rest: Shape | Array
) -> tuple[Program, tuple[Array, ...]]:
    """``f`` as a program, and the arrays that it has read."""
    closed = jax.make_jaxpr(f)(x, t, *rest)

    def tangent(x: Example, v: Example, t: Scalar, *rest: Array) -> PyTree:
        return jax.jvp(lambda x: f(x, t, *rest), (x,), (v,))

    programs = [closed]
    with contextlib.suppress(TypeError, ValueError):  # A callback may have no derivative.
        # If a function defines its own derivative, its text does not show this derivative.
        programs.append(jax.make_jaxpr(tangent)(x, x, t, *rest))
    text = "\n".join([*map(str, programs), *(c for p in programs for c in _inner_constants(p))])
    # Some versions of JAX wrap arrays of NumPy in a class of their own.
    arrays = (c if isinstance(c, jax.Array) else jnp.asarray(c) for c in closed.consts)
    return Program(closed.jaxpr, text), tuple(arrays)


def _inner_constants(jaxpr: ClosedJaxpr) -> Iterator[str]:
    """The type, shape and checksum of every array that a function inside ``jaxpr`` has read."""
    for equation in equations(jaxpr):
        for inner in jax.tree.leaves(list(equation.params.values())):
            for constant in map(np.asarray, getattr(inner, "consts", ())):
                digest = hashlib.sha256(np.ascontiguousarray(constant)).hexdigest()
                yield f"{constant.dtype}{constant.shape} {digest}"


def _in_float32(array: Array | np.ndarray) -> Array | np.ndarray:
    """``array``, in float32 if it has half precision."""
    if not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits >= 32:
        return array
    warnings.warn(f"weights of {array.dtype} are evaluated in float32", stacklevel=2)
    return jnp.asarray(array, jnp.float32)


def _is_array(leaf: object) -> bool:
    """Whether a leaf is an array of JAX or NumPy."""
    return isinstance(leaf, jax.Array | np.ndarray)
