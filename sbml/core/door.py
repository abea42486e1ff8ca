"""The door of the library: one decorator checks the arguments of a public function.

    @checked
    def warp(u: Elementwise, density: Bins) -> tuple[Elementwise, Elementwise]: ...

The annotations say what an argument must be: its type and, by jaxtyping, the kind of numbers and
the shape of an array, where a letter is the same size in all arguments. A wrong argument is a
ValueError of one line that names it, says what it is, and what it must be. Under ``jit``, ``vmap``,
``grad`` and ``scan`` the check runs while JAX traces, and costs nothing afterwards; outside of them
a call takes about a tenth of a millisecond longer. Behind the door nothing is checked again.

An annotation can also have conditions, ``Annotated[int, condition("of at least 1", ...)]``; the
values of tracers are unknown, so they fulfil every condition.

The first call also checks that XLA's sums are right (``sbml.compiler``). :func:`typed` is the door
of dataclasses, and of functions that compute by NumPy only: it leaves XLA alone.
"""

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import jax
import numpy as np
from beartype import BeartypeConf
from beartype.door import is_bearable
from beartype.vale import Is
from jaxtyping import AbstractArray, Real, jaxtyped

from sbml.core import compiler

C = TypeVar("C", bound=Callable[..., Any])

_TOWER = BeartypeConf(is_pep484_tower=True)  # An int is a float, as for mypy.
_KINDS = {
    "Float": "floating-point numbers",
    "Integer": "integers",
    "Num": "numbers",
    "Real": "real numbers",
    "Bool": "truth values",
    "Shaped": "an array",
    "Key": "typed keys (of jax.random.key, or of jax.random.wrap_key_data for older ones)",
}
_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a text",
    list: "a list",
    dict: "a dict",
    tuple: "a tuple",
    type(None): "None",
}
_PLURALS = {int: "integers", float: "numbers", str: "names"}
_LIMITS = {"gt": "above", "ge": "of at least", "lt": "below", "le": "at most"}
_UNIONS = (types.UnionType, typing.Union)
_REAL: Any = Real[np.ndarray | jax.Array | np.number, "..."]

_words: dict[Any, str] = {}  # of conditions
_usual: dict[Any, bool] = {}  # whether they are named only for a value that breaks them


def condition(words: str, holds: Callable[[Any], Any], *, usual: bool = False) -> Any:
    """A condition for ``Annotated``; ``words`` follow the type in a message, "an integer WORDS".
    One that ``usual`` values fulfil is named only in the message for a value that does not."""
    found = Is[lambda value: isinstance(value, jax.core.Tracer) or bool(holds(value))]
    _words[found], _usual[found] = words, usual
    return found


def checked(function: C) -> C:
    """``function``, which checks its arguments at every call, and XLA's sums at the first one.

    Raises:
      ValueError: an argument does not fit its annotation.
      MiscompilationError: XLA for CPU computes sums wrongly.
    """
    inner = typed(function)

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        compiler.check()
        return inner(*args, **kwargs)

    return cast(C, inside)


def typed(function: C) -> C:
    """``function``, or a dataclass, which checks its arguments at every call.

    Raises:
      ValueError: an argument does not fit its annotation.
    """
    if isinstance(function, type):
        cls: Any = function
        cls.__init__ = typed(cls.__init__)
        return function
    signature = inspect.signature(function)

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(function, include_extras=True)

    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        with jaxtyped("context"):
            for name, value in given.items():
                if name in hints() and not fits(value, hints()[name]):
                    raise ValueError(_message(name, given, hints()[name]))
        return function(*args, **kwargs)

    return cast(C, inside)


def fits(value: Any, hint: Any) -> bool:
    """Whether ``value`` is as ``hint`` says.

    A NumPy number also counts as a Python number. A Python number counts as an array without
    dimensions, but only if ``hint`` takes no arrays with dimensions.
    """
    if isinstance(value, bool) and not is_bearable(object(), hint):
        return hint is bool or bool in typing.get_args(hint)
    if isinstance(value, np.number):  # As an array, so that the annotation tells its kind.
        return fits(np.asarray(value), hint) or fits(value.item(), hint)
    if type(value) is tuple:
        value = tuple(n.item() if isinstance(n, np.integer) else n for n in value)
    if is_bearable(value, hint, conf=_TOWER):
        return True
    if not isinstance(value, int | float) or is_bearable(np.asarray([value]), hint):
        return False
    return bool(is_bearable(np.asarray(value), hint))


def _message(name: str, given: dict[str, Any], hint: Any) -> str:
    """The message for the argument ``name`` of those that are ``given``."""
    arrays = {n: v for n, v in given.items() if n not in (name, "key") and _is_array(v)}
    others = [f"{n} has shape {v.shape}" for n, v in arrays.items()]
    shapes = f" ({', '.join(others)})" if others and _is_array(given[name]) else ""
    needed = needs(hint, _broken(given[name], hint))
    return f"{name} is {shown(given[name], hint)}: give {needed}{shapes}"


def _broken(value: Any, hint: Any) -> list[Any]:
    """The conditions of ``hint`` that ``value`` does not fulfil; none if its type is wrong."""
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is not typing.Annotated:  # The hint may be a union.
        return next(filter(None, (_broken(value, part) for part in parts)), [])
    return [each for each in parts[1:] if fits(value, parts[0]) and not each.is_valid(value)]


def _is_array(value: Any) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def shown(value: Any, hint: Any = None) -> str:
    """An argument in words: an array by its kind and shape, anything else by its value, with its
    type if the ``hint`` takes another one.

    If the ``hint`` has a condition, the words include the least and the largest of real numbers.
    """
    if _is_array(value):
        text = f"{value.dtype} of shape {value.shape}"
        known = is_bearable(value, _REAL) and not isinstance(value, jax.core.Tracer)
        if typing.get_origin(hint) is typing.Annotated and known and value.size:
            text += f" in [{np.min(value):g}, {np.max(value):g}]"
        return text
    return brief(value) if _broken(value, hint) else f"{brief(value)} ({type(value).__name__})"


def brief(value: Any, form: Callable[[Any], str] = repr) -> str:
    """The first characters of ``form(value)``, for messages."""
    text = form(value)
    return text if len(text) <= 60 else text[:57] + "..."


def unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """The type in an annotation, and the rules for its values."""
    rules: list[Any] = []
    while typing.get_origin(hint) is typing.Annotated:
        hint, *more = typing.get_args(hint)
        rules += [rule for each in more for rule in getattr(each, "metadata", [each])]
    return hint, rules


def choices(hint: Any) -> Collection[str]:
    """The names among which a value, or each part of it, must be; () if it is no such name."""
    kind, rules = unwrapped(hint)
    named = (getattr(getattr(rule, "func", None), "choices", ()) for rule in rules)
    parts = typing.get_args(kind) if typing.get_origin(kind) in (tuple, *_UNIONS) else ()
    return next(filter(None, (*named, *map(choices, parts))), ())


def needs(hint: Any, broken: Collection[Any] = (), plural: bool = False) -> str:
    """What a value must be, in words: "an integer of at least 1, or None"; usual conditions are
    named only if ``broken``."""
    kind, rules = unwrapped(hint)
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in _UNIONS:
        # The same words are named once, NumPy's numbers and scalar arrays beside a number never.
        scalar = "" if float in parts else "none"
        named = [p for p in parts if p is not np.number and getattr(p, "dim_str", None) != scalar]
        # The rules are for each part; "" is none, because Annotated takes at least one.
        each = (p if p is type(None) else typing.Annotated[p, *rules, ""] for p in named)
        return ", or ".join(dict.fromkeys(needs(part, broken) for part in each))
    if origin is not tuple and (names := choices(hint)):
        known = ", ".join(sorted(filter(None, names)))
        return f"{'one ' * (not plural)}of {known}{', or nothing' * ('' in names)}"
    conditions = [_words[r] for r in rules if r in _words and (r in broken or not _usual[r])]
    limits = " and ".join(filter(None, (_limit(name, rules) for name in _LIMITS)))
    alike = all(part in (parts[0], Ellipsis) for part in parts)
    if origin is tuple and alike and not conditions:
        few = any(getattr(rule, "min_length", 0) for rule in rules)
        count = ("one or more" if few else "any number of") if Ellipsis in parts else len(parts)
        words = f"{count} {needs(parts[0], plural=True)}"
    elif Callable in (kind, origin):
        words = "a function"
    else:
        words = _of_class(parts[0] if origin is type else origin or kind, origin is type, plural)
    return " ".join(filter(None, (words, limits, ", ".join(conditions))))


def _of_class(kind: Any, itself: bool, plural: bool) -> str:
    if kind in _NAMES or not isinstance(kind, type):
        return (_PLURALS if plural else _NAMES).get(kind, str(kind))
    if issubclass(kind, AbstractArray):
        words = next(words for name, words in _KINDS.items() if kind.__name__.startswith(name))
        any_shape = kind.dim_str in ("...", "*any")
        return words if any_shape else f"{words} of shape ({', '.join(kind.dim_str.split())})"
    public = re.sub(r"\._\w+", "", kind.__module__)
    what = "a class derived from" if itself else "an object of the class"
    return f"{what} {public}.{kind.__name__}"


def _limit(name: str, rules: Collection[Any]) -> str:
    """The tightest limit of this kind in words; "" if there is none."""
    bounds = [b for rule in rules if (b := getattr(rule, name, None)) is not None]
    if not bounds:
        return ""
    bound = (max if name[0] == "g" else min)(bounds)
    power = int(bound).bit_length() - 1
    shown = re.sub(r"e\+?(-?)0*", r"e\1", f"{bound:g}")
    return f"{_LIMITS[name]} {f'2^{power}' if bound == 2**power > 2**15 else shown}"
