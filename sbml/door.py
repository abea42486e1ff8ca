"""The door of the library: one decorator checks the arguments of a public function.

    @checked
    def warp(u: Elementwise, density: Bins) -> tuple[Elementwise, Elementwise]: ...

The annotations say what an argument must be: its type and, by jaxtyping, the kind of numbers and
the shape of an array, where a letter is the same size in all arguments. A wrong argument is a
ValueError of one line that names it, says what it is, and what it must be. Under ``jit``, ``vmap``,
``grad`` and ``scan`` the check runs while JAX traces, and costs nothing afterwards; outside of them
a call takes about a tenth of a millisecond longer. Behind the door nothing is checked again.

The first call also checks that XLA's sums are right (``sbml.compiler``).
"""

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable
from jaxtyping import AbstractArray, jaxtyped

from sbml import compiler

P = ParamSpec("P")
R = TypeVar("R")

_TOWER = BeartypeConf(is_pep484_tower=True)  # An int is a float, as for mypy.
_KINDS = {
    "Float": "floating-point numbers",
    "Integer": "integers",
    "Num": "numbers",
    "Bool": "truth values",
    "Shaped": "an array",
    "Key": "typed keys, as of jax.random.key(seed),",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """``function``, which checks its arguments at every call.

    Raises:
      ValueError: an argument does not fit its annotation.
      MiscompilationError: XLA for CPU computes sums wrongly.
    """
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler.check()
        given = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            for name, value in given.items():
                if name in hints() and not _fits(value, hints()[name]):
                    raise ValueError(_message(name, given, hints()[name]))
        return function(*args, **kwargs)

    return inside


def _fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is as ``hint`` says. A Python number is an array without dimensions."""
    if isinstance(value, bool) and not is_bearable(object(), hint):
        return hint is bool or bool in typing.get_args(hint)
    if is_bearable(value, hint, conf=_TOWER):
        return True
    return isinstance(value, int | float) and bool(is_bearable(np.asarray(value), hint))


def _message(name: str, given: dict[str, Any], hint: Any) -> str:
    """The message for the argument ``name`` of those that are ``given``."""
    others = [f"{n} has shape {v.shape}" for n, v in given.items() if n != name and _is_array(v)]
    shapes = f" ({', '.join(others)})" if others and _is_array(given[name]) else ""
    return f"{name} is {shown(given[name])}: give {needs(hint)}{shapes}"


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def shown(value: Any) -> str:
    """An argument in words: an array by its kind and shape, anything else by its value."""
    if _is_array(value):
        return f"{value.dtype} of shape {value.shape}"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def needs(hint: Any) -> str:
    """What an argument must be, in words."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        kind = next(words for name, words in _KINDS.items() if hint.__name__.startswith(name))
        if hint.dim_str in ("...", "*any"):
            return kind
        return f"{kind} of shape ({', '.join(hint.dim_str.split())})"
    if typing.get_origin(hint) is typing.Annotated:
        return needs(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        # NumPy's types, which stand for the same, have the same words.
        each = [needs(inner) for inner in typing.get_args(hint) if inner is not np.number]
        return " or ".join(dict.fromkeys(each))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))
