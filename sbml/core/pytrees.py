"""Dataclasses as pytrees: fields of numbers are leaves, all others are static.

A field is static if its value has leaves of which none is a number (a function, a string, a
boolean), or if it is declared static by ``dataclasses.field(metadata={"static": True})``. A value
without leaves, such as None, is not static. A value that is itself a pytree with numbers is not
static either: a function with parameters, such as ``jax.tree_util.Partial(f, params)`` or an
Equinox module, contributes its leaves.

The rule is applied to the values that ``__init__`` receives. A copy that JAX makes has the same
leaves and static fields as the original object, even if its leaves are tracers, None or axes of
``vmap``.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

import jax
import numpy as np

from sbml.core.types import PyTree, T

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Class = TypeVar("Class", bound=type)

_LEAVES = "_names_of_leaves"
Leaf = tuple[jax.tree_util.GetAttrKey, PyTree]
# The names of the leaves, and the static fields with their values.
Static = tuple[tuple[str, ...], tuple[tuple[str, object], ...]]


def register(cls: Class) -> Class:
    """Register ``cls``, which is or will be a dataclass, as a pytree; also a class decorator."""
    jax.tree_util.register_pytree_with_keys(
        cls, _flatten, lambda static, leaves: _unflatten(cls, static, leaves)
    )
    return cls


def static(default: T) -> T:
    """A static field of a dataclass, with its default."""
    return dataclasses.field(default=default, metadata={"static": True})


def _is_number(value: object) -> bool:
    if isinstance(value, bool):
        return False
    kinds = (int, float, complex, np.generic, np.ndarray, jax.Array, jax.ShapeDtypeStruct)
    return isinstance(value, kinds)


def _is_leaf(field: dataclasses.Field, value: PyTree) -> bool:
    parts = jax.tree.leaves(value)
    return not field.metadata.get("static") and (not parts or any(map(_is_number, parts)))


def _flatten(node: "DataclassInstance") -> tuple[tuple[Leaf, ...], Static]:
    fields = dataclasses.fields(node)
    names = vars(node).get(_LEAVES)
    if names is None:
        names = tuple(f.name for f in fields if _is_leaf(f, getattr(node, f.name)))
    rest = tuple((f.name, getattr(node, f.name)) for f in fields if f.name not in names)
    leaves = tuple((jax.tree_util.GetAttrKey(name), getattr(node, name)) for name in names)
    return leaves, (names, rest)


def _unflatten(cls: type[T], static: Static, leaves: Iterable[PyTree]) -> T:
    names, rest = static
    node = object.__new__(cls)  # __init__ would refuse leaves that are not numbers.
    for name, value in (*zip(names, leaves, strict=True), *rest, (_LEAVES, names)):
        object.__setattr__(node, name, value)
    return node


def in_batches(
    f: Callable[[np.ndarray], PyTree], ids: np.ndarray, size: int
) -> Iterator[tuple[np.ndarray, PyTree]]:
    """The ids and ``f(ids)`` of each batch of ``ids (n,)``; ``f`` returns a tree of arrays with one
    row for each id.

    All calls of ``f`` have ``size`` ids, so that one compiled function serves them. The last batch
    is filled up with its own ids, whose rows are dropped: every id counts once.
    """

    def rows_of(batch: np.ndarray) -> tuple[np.ndarray, PyTree]:
        rows = f(np.resize(batch, size))
        return batch, jax.tree.map(lambda a: np.asarray(a)[: len(batch)], rows)

    return (rows_of(ids[start : start + size]) for start in range(0, len(ids), size))


def mapped(f: Callable[..., PyTree], rows: PyTree, size: int | None = None) -> PyTree:
    """``f`` of every row of a tree of arrays, at most ``size`` of them at once; None for all.

    The batches have one size, filled up with the last row, so that the program has ``f`` once.
    """
    n = len(jax.tree.leaves(rows)[0])
    batches = -(-n // (size or n))
    if batches <= 1:
        return jax.vmap(f)(rows)
    places = np.minimum(np.arange(batches * -(-n // batches)), n - 1).reshape(batches, -1)
    found = jax.lax.map(jax.vmap(f), jax.tree.map(lambda leaf: leaf[places], rows))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:n], found)


def when_known(check: Callable[[PyTree], None], value: PyTree) -> None:
    """Call ``check(value)``, in a compiled function when it has computed the array ``value``."""
    if isinstance(value, jax.core.Tracer):
        jax.debug.callback(check, value)
    else:
        check(value)
