"""Sections of a config: frozen pydantic models, in which a field is one line.

    lr: float = field(2e-4, "largest learning rate", gt=0, le=1)

From this line come the default, the check of a value, the message of its error, a line of
``--help=optim`` and a row in the documentation. A wrong value raises a ValueError of this form:

    optim.lr=0: give a number above 0 and at most 1

A section with a choice, such as the network, has a name and the fields of the class of that name
(:class:`Chosen`). An SDE, network or sampler with fields of its own is thus one file.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
import sys
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextvars import ContextVar
from decimal import Decimal
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import pydantic
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, Field

from sbml.core import door
from sbml.core.door import brief
from sbml.core.registry import Registry, hint, listed
from sbml.core.scalars import notation

# Steps, images and draws are int32 numbers on the devices. A field of one of these types must not
# set a lower limit of its own, because pydantic would replace this one by it.
Positive = Annotated[int, Ge(1), Lt(2**31)]
Natural = Annotated[int, Ge(0), Lt(2**31)]
Seed = Annotated[int, Ge(0), Lt(2**32)]
Size = Annotated[int, Ge(0), Lt(2**16)]
PositiveSize = Annotated[int, Ge(1), Lt(2**16)]

# The program computes in float32, where smaller numbers are 0 and larger ones infinite.
SMALLEST, LARGEST = (float(end) for end in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))

# The widest limits of a number of a network or of another part; its class knows the true range.
_OWN: dict[Any, Any] = {
    int: Annotated[int, Gt(-(2**16)), Lt(2**16)],
    float: Annotated[float, Ge(-1e6), Le(1e6)],
}
_OWN[Any] = _OWN[float]

# Words that other programs have for a field; each row has words for the same thing.
ALIKE = [
    "lr learning_rate",
    "num_steps steps epochs num_epochs iterations fixed_steps",
    "num_images max_images n count num_samples n_samples",
    "nf width channels filters hidden hidden_size dim",
    "num_res_blocks depth layers num_layers blocks",
]


class Override(str):
    """The text of a value on the command line, which a section reads by the type of its field."""


def field(default: Any, meaning: str, **limits: Any) -> Any:
    """A field with its default, its meaning with the unit, and pydantic's limits ``gt``, ``ge``,
    ``lt``, ``le`` and ``min_length``."""
    return Field(default, description=meaning, **limits)


@dataclasses.dataclass(frozen=True)
class Among:
    """Checks that a name is one of ``choices``; a registry also finds those of other packages."""

    choices: Collection[str]

    def __call__(self, name: Any) -> Any:
        if name not in self.choices:
            raise ValueError
        if isinstance(self.choices, Registry):
            self.choices[name]  # It tells what is wrong with a part of another package.
        return name


def hint_of(found: pydantic.fields.FieldInfo) -> Any:
    """The annotation of a field with the rules for its values."""
    return Annotated[found.annotation, *found.metadata, ""]


def among(choices: Collection[str]) -> AfterValidator:
    """The annotation of a name that must be one of ``choices``."""
    return AfterValidator(Among(choices))


@contextlib.contextmanager
def errors_of(name: object) -> Iterator[None]:
    """A context that puts ``name`` before the message of every ValueError."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def refusal(
    name: str, value: Any, needs: str, wrong: str = "", choices: Collection[str] = ()
) -> ValueError:
    """The error for a field ``name`` with an invalid ``value``; ``needs`` says what is valid, and
    ``wrong`` is the part of the value that is none of the ``choices``, if there are any."""
    return ValueError(f"{name}={brief(value, notation)}: {hint(wrong, choices, f'give {needs}')}")


def _is_plain(annotation: Any) -> bool:
    """Whether a text on the command line can stand for a value of this type."""
    kind = door.unwrapped(annotation)[0]
    if typing.get_origin(kind) not in (tuple, typing.Union, UnionType):
        return kind in (int, float, bool, str)
    inner = {*typing.get_args(kind)} - {NoneType, Ellipsis}
    return len(inner) == 1 and _is_plain(*inner)


def _parsed(text: str, annotation: Any) -> Any:
    """The value that ``text`` stands for in a field of this type; the text itself if it stands for
    none, which the field then refuses."""
    kind = door.unwrapped(annotation)[0]
    kinds = typing.get_args(kind)
    if NoneType in kinds:
        present = next(kind for kind in kinds if kind is not NoneType)
        return None if text == "None" else _parsed(text, present)
    if typing.get_origin(kind) is tuple and text.strip():
        parts = text.removeprefix("(").removesuffix(")").split(",")
        return tuple(_parsed(part.strip(), kinds[0]) for part in parts if part.strip())
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if kind in (int, float) and text.isascii():
        with contextlib.suppress(ValueError):
            # A number that float64 rounds to 0 must not pass for the 0 that can mean "off".
            return kind(text) or (math.ulp(0.0) if Decimal(text) else kind(0))
    return str(text)


def as_tuples(value: Any) -> Any:
    """``value`` with tuples in place of lists, which JSON does not tell apart, and with Python's
    numbers in place of NumPy's, which JSON does not have."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(map(as_tuples, value)) if isinstance(value, list | tuple) else value


class Section(pydantic.BaseModel):
    """A part of a config: a frozen class of fields, or of further sections.

    ``section`` is its name on the command line, and empty for the whole config. ``siblings`` are
    the names of fields beside its own that a user can set there (:class:`Chosen`).
    """

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False
    )
    section: ClassVar[str] = ""
    origin: ClassVar[Any] = None  # the class whose fields these are (``section_of``)
    siblings: ClassVar[tuple[str, ...]] = ()  # the fields of the section that names this class
    # The full names of the fields and sections of the config that is made now, for messages.
    known: ClassVar[ContextVar[Iterable[str]]] = ContextVar("known", default=())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            lines: dict[Any, str] = {}  # one for a field, of which several values may be wrong
            for e in error.errors():
                lines.setdefault(e["loc"][:1], _line(type(self), values, e))
            raise ValueError("; ".join(lines.values())) from None

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        """The value of one field, from the command line, a config file or JSON."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, Mapping):
            return kind(**value)
        value = _parsed(value, kind) if isinstance(value, Override) else as_tuples(value)
        if _beyond_float32(value) or (isinstance(value, str) and "\n" in value):
            raise ValueError
        if isinstance(value, tuple) and value and all(isinstance(name, str) for name in value):
            return tuple(n.strip() for name in value for n in name.split(",") if n.strip())
        return value

    @pydantic.model_validator(mode="after")
    def _checked(self) -> Self:
        self.check()
        return self

    def check(self) -> None:
        """Raise a ValueError if fields that are valid by themselves do not fit together."""

    @classmethod
    def name_of(cls, field: str) -> str:
        """The name of ``field`` on the command line, without ``--config.``."""
        return f"{cls.section}.{field}" if cls.section else field

    def replace(self, **changes: Any) -> Self:
        """This section with other values of some fields."""
        return type(self)(**{**dict(self), **changes})

    def plain(self) -> dict[str, Any]:
        """The fields in the types of JSON: a section is a dict with sorted names."""
        return {name: plain(value) for name, value in sorted(self)}


def _beyond_float32(value: Any) -> bool:
    """Whether a number in ``value`` is finite, and 0 or infinite in float32."""
    each = value if isinstance(value, tuple) else (value,)
    floats = [abs(v) for v in each if isinstance(v, float) and math.isfinite(v)]
    return any(0 < v < SMALLEST or v > LARGEST for v in floats)


def plain(value: Any) -> Any:
    """``value`` in the types of JSON."""
    if isinstance(value, Section):
        return value.plain()
    return [plain(v) for v in value] if isinstance(value, tuple) else value


def _line(kind: type[Section], values: Mapping[str, Any], error: Any) -> str:
    """The message of one of pydantic's errors for a section made of ``values``."""
    cause = error.get("ctx", {}).get("error")
    if not error["loc"]:
        return str(cause)
    name = str(error["loc"][0])
    if error["type"] == "extra_forbidden":
        return unknown(kind.section, name, [*kind.siblings, *kind.model_fields])
    found = kind.model_fields[name]
    of_section = isinstance(found.annotation, type) and issubclass(found.annotation, Section)
    if cause is not None and str(cause):
        return str(cause) if of_section else f"{kind.name_of(name)}: {cause}"
    wanted = "a section" if of_section else door.needs(hint_of(found))
    if _beyond_float32(error["input"]) or _beyond_float32(_parsed(str(error["input"]), float)):
        ends = " to ".join(notation(end, ".2g") for end in (SMALLEST, LARGEST))
        wanted += f", in float32, whose range is {ends}"
    choices = door.choices(hint_of(found))
    return str(refusal(kind.name_of(name), values.get(name), wanted, str(error["input"]), choices))


def unknown(section: str, name: str, fields: Collection[str]) -> str:
    """The message for a field that ``section`` does not have. It proposes fields of the section
    that are ``ALIKE``, else others that are ``known``, else one with a similar name."""
    name = brief(name, notation)
    where, own = f"config.{section}".rstrip("."), f"{section}.".lstrip(".")
    alike = {name}.union(*(row for row in map(str.split, ALIKE) if name in row))
    near = [f"{own}{field}" for field in fields if field in alike]
    near = near or [full for full in Section.known.get() if full.rpartition(".")[2] in alike]
    near = difflib.get_close_matches(f"{own}{name}", near, 3, cutoff=0)
    names = listed(name, sorted(fields)) or "none"
    said = f"did you mean {' or '.join(near)}? It has {names}"
    said = said if near else hint(name, fields, f"it has {names}", own)
    return f"{where} has no field {name}: {said}"


@functools.cache
def section_of(
    kind: Any, section: str, skip: tuple[str, ...], taken: tuple[str, ...] = ()
) -> type[Section]:
    """A section with the fields of the dataclass ``kind``, except those in ``skip``.

    The section checks the types, and that numbers are finite and not huge (below 2^16 for integers,
    at most 1e6 for others). The class checks the ranges when it is made. A field cannot have a name
    of ``taken``, or of something else that a section has.
    """

    def annotation(field: dataclasses.Field) -> Any:
        found: Any = field.type
        if isinstance(found, str):  # The file has ``from __future__ import annotations``.
            found = eval(found, vars(sys.modules[kind.__module__]))
        if typing.get_origin(found) is Annotated:  # The class itself checks the conditions.
            found = typing.get_args(found)[0]
            if typing.get_origin(found) is not tuple and float in typing.get_args(found):
                found = float  # a number of an SDE
        if typing.get_origin(found) is tuple and typing.get_args(found)[1:] == (Ellipsis,):
            inner = typing.get_args(found)[0]
            return tuple.__class_getitem__((_OWN.get(inner, inner), ...))
        return _OWN.get(found, found)

    fields: dict[str, Any] = {
        field.name: (annotation(field), field.default)
        for field in dataclasses.fields(kind)
        if field.init and field.name not in skip
    }
    where = f"{kind.__module__}.{kind.__name__}"
    for name, (of_field, default) in fields.items():
        if not _is_plain(of_field):
            raise ValueError(
                f"config.{section}: {where} has a field {name} whose type a config has no values "
                f"for ({of_field}): give its fields types such as float, int, bool or str"
            )
        if default is dataclasses.MISSING:
            raise ValueError(
                f"config.{section}: {where} has a field {name} without a default: give it one"
            )
        if name in taken or hasattr(Section, name):
            raise ValueError(
                f"config.{section}: {where} has a field {name}, a name that the section uses "
                "itself: rename the field"
            )
    about = f"The fields of ``{where}``, which explains them."
    made = pydantic.create_model(where, __base__=Section, __doc__=about, **fields)
    made.section, made.origin, made.siblings = section, kind, taken
    return made


class Chosen(Section):
    """A section that names a class in one of its fields, and has the fields of this class too
    (:func:`section_of`).

    Attributes:
      choice: the field with the name.
      parts: the classes by name.
      skip: fields of the class that a config does not set, or sets by a field of the section.
    """

    model_config = pydantic.ConfigDict(extra="allow")
    choice: ClassVar[str] = "name"
    parts: ClassVar[Mapping[str, Any]] = {}
    skip: ClassVar[tuple[str, ...]] = ()

    @pydantic.model_validator(mode="before")
    @classmethod
    def _with_own(cls, values: dict[str, Any]) -> dict[str, Any]:
        general = {field: values[field] for field in cls.model_fields if field in values}
        own = {field: value for field, value in values.items() if field not in general}
        kind = cls.kind_of(values.get(cls.choice, cls.model_fields[cls.choice].default))
        if kind is None:
            return general
        made = section_of(kind, cls.section, cls.skip, tuple(cls.model_fields))
        return {**general, **dict(made(**cls.relevant(own, made)))}

    @classmethod
    def kind_of(cls, name: Any) -> Any:
        """The class called ``name``; None if there is none."""
        with errors_of(cls.name_of(cls.choice)):
            return cls.parts[name] if isinstance(name, str) and name in cls.parts else None

    @classmethod
    def relevant(cls, own: dict[str, Any], made: type[Section]) -> dict[str, Any]:
        """Those of the values ``own`` that are meant for the class with the fields of ``made``."""
        return own

    @property
    def own(self) -> dict[str, Any]:
        """The fields of the class."""
        return dict(self.model_extra or {})

    def build(self) -> Any:
        """An object of the class, which refuses fields outside their ranges."""
        with errors_of(f"config.{self.section}"):
            return self.parts[getattr(self, self.choice)](**self.own)
