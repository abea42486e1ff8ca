"""Fields of a config's sections: each has a default and a rule that every value must meet.

    class Latents(Section):
        section = "latents"
        count: int = integer(8, least=2, below=1000)     # images of eval.split

A section is a frozen dataclass. When it is built, it checks every field by the field's rule, and
then the rules between its fields, :meth:`Section.check`. All refusals have one wording,

    latents.count=1: need an integer of at least 2 and below 1000

A default of None, or of "" for a choice, says that the field may be left open.
"""

import contextlib
import dataclasses
import math
import numbers
import operator
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, Self

# Steps, images and draws are counted by int32 on the devices.
COUNT = 2**31


def refusal(name: str, value: Any, needs: str) -> ValueError:
    """The error of a field whose value cannot be used: it names the field, the value, the need."""
    return ValueError(f"{name}={value}: need {needs}")


@contextlib.contextmanager
def section_errors(section: str) -> Iterator[None]:
    """Let a ValueError of what is built from ``section`` begin with its name."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"config.{section}: {error}") from error


class Rule(NamedTuple):
    """What the values of a field must be: of Python's type ``kind``, and so that they ``hold``."""

    kind: type
    holds: Callable[[Any], bool]
    needs: str


def _field(default: Any, kind: type, holds: Callable[[Any], bool], needs: str) -> Any:
    rule = Rule(kind, holds, needs)
    if default is None:
        rule = Rule(kind, lambda value: value is None or holds(value), f"{needs}, or None")
    return dataclasses.field(default=default, metadata={"rule": rule})


def _shown(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if bound == 2**power and power > 15 else f"{bound:g}"


def _interval(bounds: Mapping[str, float | None]) -> tuple[Callable[[Any], bool], str]:
    """Whether a number lies within ``bounds``, and what they are in words."""
    tests = {"above": operator.gt, "of at least": operator.ge, "below": operator.lt}
    tests["at most"] = operator.le
    given = {word: bound for word, bound in bounds.items() if bound is not None}
    words = " and ".join(f"{word} {_shown(bound)}" for word, bound in given.items())
    return lambda value: all(tests[word](value, b) for word, b in given.items()), words


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def integer(default: int | None, *, least: int = 0, below: int = COUNT) -> Any:
    """An integer in [least, below)."""
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
    """A finite number above or from ``least``, and below or up to ``most``."""
    bounds = {"above": above, "of at least": least, "below": below, "at most": most}
    within, words = _interval(bounds)
    return _field(
        default, float, lambda value: _is_real(value) and within(value), f"a number {words}"
    )


def reals(default: tuple[float, ...], *, least: float, most: float, each: str) -> Any:
    """A tuple of finite numbers in [least, most], one for ``each`` of "a,b"."""
    within, words = _interval({"of at least": least, "at most": most})
    length = len(each.split(","))

    def holds(value: Any) -> bool:
        fits = isinstance(value, tuple) and len(value) == length
        return fits and all(_is_real(v) and within(v) for v in value)

    return _field(default, tuple, holds, f"{length} numbers {words}: {each}")


def integers(default: tuple[int, ...], *, least: int, below: int, each: str = "") -> Any:
    """A tuple of integers in [least, below): one or more, or one for ``each`` of "a,b"."""
    within, words = _interval({"of at least": least, "below": below})

    def holds(value: Any) -> bool:
        fits = isinstance(value, tuple) and (len(value) == length if each else len(value) > 0)
        return fits and all(_is_integer(v) and within(v) for v in value)

    length = len(each.split(","))
    count, form = (str(length), each) if each else ("one or more", "1 or 1,20")
    return _field(default, tuple, holds, f"{count} integers {words}: {form}")


def flag(default: bool) -> Any:
    """True or False."""
    return _field(default, bool, lambda value: isinstance(value, bool), "True or False")


def text(default: str) -> Any:
    """Any text."""
    return _field(default, str, lambda value: isinstance(value, str), "text")


def names(default: tuple[str, ...]) -> Any:
    """One name or more, ``choices_in`` reads them."""

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and all(isinstance(v, str) for v in value)

    needs = "one or more names, separated by commas"
    return _field(default, tuple, lambda v: holds(v) and bool(choices_in(v)), needs)


def choice(default: str | None, choices: Collection[str]) -> Any:
    """One of ``choices``; or empty, where that is the default."""
    allowed = {*choices, *([""] if default == "" else [])}
    needs = f"one of {', '.join(sorted(choices))}" + (", or nothing" if "" in allowed else "")
    return _field(default, str, lambda value: isinstance(value, str) and value in allowed, needs)


def check_choice(field: str, name: str, choices: Collection[str]) -> str:
    """``name`` itself.

    Raises:
      ValueError: if it is not among ``choices``, naming the config field and the choices.
    """
    if name not in choices:
        raise refusal(field, name, f"one of {', '.join(sorted(choices))}")
    return name


def choices_in(value: Collection[str]) -> list[str]:
    """The names in a field such as ``eval.estimators``; the command line's "a,b" is one string."""
    return [name.strip() for item in value for name in item.split(",") if name.strip()]


def check_finite(section: str, values: Mapping[str, Any]) -> None:
    """Refuse numbers among ``values`` that are not finite; their ranges are their owner's to check.

    Raises:
      ValueError: naming the field and its value.
    """
    for name, value in values.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, numbers.Real) and not math.isfinite(number):
                raise refusal(f"{section}.{name}", value, "finite numbers")


# No network or dequantizer is so large, nor are the numbers that it needs.
SIZE, MAGNITUDE = 2**16, 1e6
_OWNED: dict[Any, Rule] = {
    bool: Rule(bool, lambda v: isinstance(v, bool), "True or False"),
    str: Rule(str, lambda v: isinstance(v, str), "text"),
    int: Rule(int, lambda v: _is_integer(v) and abs(v) < SIZE, "an integer below 2^16"),
    float: Rule(float, lambda v: _is_real(v) and abs(v) <= MAGNITUDE, "a number up to 1e6"),
}


def _owned_rule(annotation: Any) -> Rule | None:
    """The rule of a field with this annotation; None where there is none."""
    kinds = typing.get_args(annotation)
    each = _OWNED.get(kinds[0] if kinds[1:] == (...,) else annotation)
    if each is None or not kinds:
        return each

    def holds(value: Any) -> bool:
        return isinstance(value, tuple) and all(map(each.holds, value))

    return Rule(tuple, holds, f"none or more values, each {each.needs}")


def check_owned(section: str, values: Mapping[str, Any], owner: type[Any]) -> None:
    """Refuse values of another type than the fields of dataclass ``owner``, or beyond all use.

    Integers are below 2^16 and numbers at most 1e6, in magnitude; what narrower range a field has
    is for ``owner`` to check when it is built. Fields of further types are left to it altogether.

    Raises:
      ValueError: naming the field, its value and what it must be.
    """
    check_finite(section, values)
    for field in dataclasses.fields(owner):
        rule = _owned_rule(field.type)
        if rule and field.name in values and not rule.holds(values[field.name]):
            raise refusal(f"{section}.{field.name}", values[field.name], rule.needs)


def as_tuples(value: Any) -> Any:
    """``value``, but a tuple where JSON made a list of it."""
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


def plain(value: Any) -> Any:
    """``value`` as JSON has it: a section is a dict with its fields in order, a tuple a list."""
    if isinstance(value, Section):
        value = value.to_dict()
    if isinstance(value, Mapping):
        return {name: plain(value[name]) for name in sorted(value)}
    return [plain(v) for v in value] if isinstance(value, tuple) else value


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a config: fields with rules, or further sections.

    ``section`` is its name on the command line; that of the whole config is empty.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if (rule := field.metadata.get("rule")) and not rule.holds(value):
                raise refusal(self.name_of(field.name), value, rule.needs)
        self.check()

    def check(self) -> None:
        """Raise a ValueError where fields, each right by itself, do not go together."""

    @classmethod
    def name_of(cls, field: str) -> str:
        """``field`` as the command line has it, without ``--config.``."""
        return f"{cls.section}.{field}" if cls.section else field

    def to_dict(self) -> dict[str, Any]:
        """The fields by name; of this section alone, not of those within."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def of(cls, values: Mapping[str, Any], *, complete: bool = True) -> Self:
        """The section with these ``values``, as a ConfigDict or a checkpoint's metadata has them.

        Args:
          values: by name; those of a section within are a mapping.
          complete: refuse a field that is unknown or missing. Else the unknown is left out and the
            missing has its default: that is how metadata of other versions are read.

        Raises:
          ValueError: naming the field, its value and what it must be.
        """
        known = {field.name: field.default for field in dataclasses.fields(cls)}
        if complete:
            check_fields(cls.section, values, known)
        given = {
            name: type(default).of(values[name], complete=complete)
            if isinstance(default, Section)
            else as_tuples(values[name])
            for name, default in known.items()
            if name in values
        }
        return cls(**given)


def check_fields(section: str, given: Collection[str], known: Collection[str]) -> None:
    """Refuse fields that are not ``known``, and missing ones.

    Raises:
      ValueError: naming them, and the fields that there are.
    """
    where = f"config.{section}" if section else "config"
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(
            f"{where} has the unknown fields {', '.join(unknown)}: it may have "
            f"{', '.join(sorted(known)) or 'none'}; begin the config with "
            "sbml.experiment.config.default()"
        )
    if missing := sorted(set(known) - set(given)):
        raise ValueError(
            f"{where} lacks the fields {', '.join(missing)}: begin the config with "
            "sbml.experiment.config.default()"
        )
