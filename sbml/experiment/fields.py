"""Fields of a config's sections: each has a default and a rule that every value must meet.

    @dataclasses.dataclass(frozen=True)
    class Latents(Section):
        section: ClassVar[str] = "latents"
        count: int = integer(8, least=2, below=1000)     # number of images of eval.split

A section is a frozen dataclass. When it is built, it checks each field by the rule of the field,
and then :meth:`Section.check` checks that the fields fit together. A value that breaks a rule
raises a ValueError of this form:

    latents.count=1: need an integer of at least 2 and below 1000

If the default of a field is None, or "" for a choice, the field may also have this value, which
means that it is not set.
"""

import contextlib
import dataclasses
import math
import numbers
import operator
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

# Counts are below this limit, since steps, images and draws are int32 numbers on the devices.
COUNT = 2**31


# The program computes in float32, where smaller numbers are 0 and larger ones infinite.
SMALLEST, LARGEST = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


def refusal(name: str, value: Any, needs: str) -> ValueError:
    """The error for a field ``name`` with an invalid ``value``; ``needs`` says what is valid."""
    floats = (v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, float))
    if any(_is_finite(number) and not _is_real(number) for number in floats):
        needs += f", in float32, whose range is {SMALLEST:.2g} to {LARGEST:.2g}"
    return ValueError(f"{name}={value}: need {needs}")


@contextlib.contextmanager
def section_errors(section: str) -> Iterator[None]:
    """A context that puts the name of ``section`` before the message of every ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{section}: {error}") from error


class Rule(NamedTuple):
    """The rule that the values of a field must meet."""

    kind: type  # the Python type of the values
    holds: Callable[[Any], bool]  # whether a value is valid
    needs: str  # what a value must be, in words, for the message of an error


def _field(default: Any, kind: type, holds: Callable[[Any], bool], needs: str) -> Any:
    rule = Rule(kind, holds, needs)
    if default is None:
        rule = Rule(kind, lambda value: value is None or holds(value), f"{needs}, or None")
    return dataclasses.field(default=default, metadata={"rule": rule})


def _shown(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if bound == 2**power and power > 15 else f"{bound:g}"


def _interval(bounds: Mapping[str, float | None]) -> tuple[Callable[[Any], bool], str]:
    """A test whether a number lies within ``bounds``, and the bounds in words."""
    tests = {"above": operator.gt, "of at least": operator.ge, "below": operator.lt}
    tests["at most"] = operator.le
    limits = {word: bound for word, bound in bounds.items() if bound is not None}
    words = " and ".join(f"{word} {_shown(bound)}" for word, bound in limits.items())
    return lambda value: all(tests[word](value, limit) for word, limit in limits.items()), words


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_real(value: Any) -> bool:
    return _is_finite(value) and (value == 0 or SMALLEST <= abs(value) <= LARGEST)


def integer(default: int | None, *, least: int = 0, below: int = COUNT) -> Any:
    """A field: an integer in [least, below)."""
    within, words = _interval({"of at least": least, "below": below})
    needs = f"an integer {words}"
    return _field(default, int, lambda value: _is_integer(value) and within(value), needs)


def real(
    default: float | None,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> Any:
    """A field: a finite number of float32 that is above ``above``, at least ``least``, below
    ``below`` and at most ``most``, as far as these bounds are not None."""
    bounds = {"above": above, "of at least": least, "below": below, "at most": most}
    within, words = _interval(bounds)
    return _field(
        default, float, lambda value: _is_real(value) and within(value), f"a number {words}"
    )


def reals(default: tuple[float, ...], *, least: float, most: float, each: str) -> Any:
    """A field: a tuple of finite numbers in [least, most], one for each name in ``each="a,b"``."""
    within, words = _interval({"of at least": least, "at most": most})
    length = len(each.split(","))

    def holds(value: Any) -> bool:
        fits = isinstance(value, tuple) and len(value) == length
        return fits and all(_is_real(v) and within(v) for v in value)

    return _field(default, tuple, holds, f"{length} numbers {words}: {each}")


def integers(default: tuple[int, ...], *, least: int, below: int, each: str = "") -> Any:
    """A field: a tuple of integers in [least, below), one for each name in ``each="a,b"``, or one
    or more if ``each`` is empty."""
    within, words = _interval({"of at least": least, "below": below})

    def holds(value: Any) -> bool:
        fits = isinstance(value, tuple) and (len(value) == length if each else len(value) > 0)
        return fits and all(_is_integer(v) and within(v) for v in value)

    length = len(each.split(","))
    count, form = (str(length), each) if each else ("one or more", "1 or 1,20")
    return _field(default, tuple, holds, f"{count} integers {words}: {form}")


def flag(default: bool) -> Any:
    """A field: True or False."""
    return _field(default, bool, lambda value: isinstance(value, bool), "True or False")


def text(default: str) -> Any:
    """A field: any text."""
    return _field(default, str, lambda value: isinstance(value, str), "text")


def names(default: tuple[str, ...]) -> Any:
    """A field: one or more names, which ``choices_in`` separates."""

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)

    needs = "one or more names, separated by commas"
    return _field(default, tuple, lambda v: holds(v) and bool(choices_in(v)), needs)


def choice(default: str | None, choices: Collection[str]) -> Any:
    """A field: one of ``choices``, or its default if that is None or empty."""
    allowed = {*choices, *([""] if default == "" else [])}
    needs = f"one of {', '.join(sorted(choices))}" + (", or nothing" if "" in allowed else "")
    return _field(default, str, lambda value: isinstance(value, str) and value in allowed, needs)


def check_choice(field: str, name: str, choices: Collection[str]) -> str:
    """``name``, the value of the config field ``field``, if it is one of ``choices``.

    Raises:
      ValueError: it is not; the message names the field and the choices.
    """
    if name not in choices:
        raise refusal(field, name, f"one of {', '.join(sorted(choices))}")
    return name


def choices_in(value: Collection[str]) -> list[str]:
    """The names in a field such as ``eval.estimators``; "a,b" on the command line is one string."""
    return [name.strip() for item in value for name in str(item).split(",") if name.strip()]


def check_finite(section: str, values: Mapping[str, Any]) -> None:
    """Check that all numbers in ``values`` are finite.

    Raises:
      ValueError: one is not; the message gives the field and its value.
    """
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, numbers.Real) and not math.isfinite(number):
                raise refusal(f"{section}.{name}", value, "finite numbers")


# Limits of the integers and of the numbers in the fields of a network or dequantizer.
SIZE, MAGNITUDE = 2**16, 1e6
_OWNED: dict[Any, Rule] = {
    bool: Rule(bool, lambda v: isinstance(v, bool), "True or False"),
    str: Rule(str, lambda v: isinstance(v, str), "text"),
    int: Rule(int, lambda v: _is_integer(v) and abs(v) < SIZE, "an integer below 2^16"),
    float: Rule(float, lambda v: _is_real(v) and abs(v) <= MAGNITUDE, "a number up to 1e6"),
}


def _owned_rule(annotation: Any) -> Rule | None:
    """The rule of a field with this annotation; None for types without a rule."""
    kinds = typing.get_args(annotation)
    each = _OWNED.get(kinds[0] if kinds[1:] == (...,) else annotation)
    if each is None or not kinds:
        return each

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and all(map(each.holds, value))

    return Rule(tuple, holds, f"none or more values, each {each.needs}")


def check_owned(section: str, values: Mapping[str, Any], owner: type[Any]) -> None:
    """Check that values have the types of the fields of the dataclass ``owner``, and are not huge.

    The magnitude of integers must be below 2^16, and that of numbers at most 1e6. ``owner`` checks
    the range of each field when it is built. Of fields whose type is not bool, str, int, float or a
    tuple of one of these, only numbers that are not finite are refused here.

    Raises:
      ValueError: a value is invalid; the message gives the field, the value and what it must be.
    """
    check_finite(section, values)
    for field in dataclasses.fields(owner):
        rule = _owned_rule(field.type)
        if rule and field.name in values and not rule.holds(values[field.name]):
            raise refusal(f"{section}.{field.name}", values[field.name], rule.needs)


def as_tuples(value: Any) -> Any:
    """``value`` with tuples in place of lists, which JSON does not tell apart, and with Python's
    numbers in place of NumPy's, which JSON does not have."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """``value`` in the types of JSON: a section is a dict with sorted names, a tuple a list."""
    if isinstance(value, Section):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: plain(value[name]) for name in sorted(value)}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a config: a frozen dataclass of fields with rules, or of further sections.

    ``section`` is its name on the command line, and empty for the whole config.

    Raises:
      ValueError: a field is invalid, or two fields do not fit together.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (rule := field.metadata.get("rule")) and not rule.holds(value):
                raise refusal(self.name_of(field.name), value, rule.needs)
        self.check()

    def check(self) -> None:
        """Raise a ValueError if fields that are valid by themselves do not fit together."""

    @classmethod
    def name_of(cls, field: str) -> str:
        """The name of ``field`` on the command line, without ``--config.``."""
        return f"{cls.section}.{field}" if cls.section else field

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; a section within this one stays a section."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """The section with these ``values``, which come from a ConfigDict or from a checkpoint.

        Args:
          values: the values by name; a section within this one is a mapping.
          complete: whether an unknown or missing field is an error. If False, unknown fields are
            ignored and missing fields have their defaults; so the metadata of a checkpoint of
            another version can be read.

        Raises:
          ValueError: a field is invalid; the message gives its name, value and range.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        if complete:
            check_fields(cls.section, values, defaults)
        fields = {
            name: type(default).of(values[name], complete=complete)
            if isinstance(default, Section)
            else as_tuples(values[name])
            for name, default in defaults.items()
            if name in values
        }
        return cls(**fields)


def check_fields(
    section: str, given: Collection[str], known: Collection[str], maker: str = "default()"
) -> None:
    """Check that the names in ``given`` are those in ``known``; ``maker`` is a call of a function
    in ``sbml.experiment.config`` whose result has these names.

    Raises:
      ValueError: a name is unknown or missing; the message lists such names.
    """
    where = f"config.{section}" if section else "config"
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{where} has the unknown fields {', '.join(unknown)}: it may have "
            f"{', '.join(sorted(known)) or 'none'}; begin the config with "
            f"sbml.experiment.config.{maker}"
        )
    if missing := sorted(set(known) - set(given)):
        raise ValueError(
            f"{where} lacks the fields {', '.join(missing)}: begin the config with "
            f"sbml.experiment.config.{maker}"
        )
