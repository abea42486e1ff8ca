"""All fields of a config, from the lines that define them: for ``--help=eval`` and for the page
``docs/fields.md``.
"""

import inspect
import re
import typing
from collections.abc import Iterator
from typing import NamedTuple

from sbml.core import door
from sbml.core.registry import hint, listed
from sbml.core.scalars import notation
from sbml.program.config.config import Config
from sbml.program.config.fields import Chosen, Section, hint_of
from sbml.program.runtime import refusals


class Row(NamedTuple):
    """A field: its name on the command line, default, what a value must be, and its meaning."""

    name: str
    default: str
    needs: str
    meaning: str


def sections(section: Section | None = None) -> Iterator[tuple[str, Section]]:
    """The names of the sections of a config, with their defaults; "config" is the config itself."""
    section = Config() if section is None else section
    yield section.section or "config", section
    for value in dict(section).values():
        if isinstance(value, Section):
            yield from sections(value)


def rows(section: Section) -> list[Row]:
    """The fields of ``section``, and those of the class that it names by default."""
    found, known = [], type(section).model_fields
    for name, value in dict(section).items():
        if isinstance(value, Section):
            continue
        if name in known and (meaning := known[name].description):
            wanted = door.needs(hint_of(known[name]))
        else:
            own = typing.get_type_hints(_origin(section), include_extras=True)[name]
            wanted = door.needs(own)
            meaning = f"field of {_choice(section) or 'its class'}"
        found.append(Row(section.name_of(name), notation(value), wanted, meaning))
    return found


def _choice(section: Section) -> str:
    """The name of the class that ``section`` chooses; empty for one without a choice."""
    return getattr(section, section.choice) if isinstance(section, Chosen) else ""


def _origin(section: Section) -> type | None:
    """The class whose fields ``section`` has beside its own; None if there is none."""
    return section.kind_of(_choice(section)) if isinstance(section, Chosen) else section.origin


def overview() -> list[str]:
    """A line for each section: how its fields are listed, and what it is for."""
    about = {name: first_sentence(section) for name, section in sections()}
    return [
        entry(f"--help={name}", re.split(r"[:;.] |, which explains|[.]$", text)[0])
        for name, text in about.items()
    ]


def entry(head: str, meaning: str) -> str:
    """A flag and its meaning in two columns, for a terminal."""
    body = refusals.wrapped(f"{'':29}{plain(meaning)}", hang=0)
    return f"  {head:26} {body[29:]}" if len(head) <= 26 else f"  {head}\n{body}"


def plain(text: str) -> str:
    """A docstring without its markup: the words of ``x`` and :func:`x`."""
    return re.sub(r"(?::[\w:]+:)?(`+)~?(.+?)\1", r"\2", text)


def filled(text: str, indent: int) -> str:
    """A docstring with an indentation, for a terminal. Formulas and tables keep their lines."""
    lines = []
    for part in plain(text).split("\n\n"):
        if not part.startswith("    "):  # Prose, or a list, whose items go on after four spaces.
            part = re.sub(r"(?<!:)\n(?:    |(?=\S))", " ", part)
        for line in [*part.split("\n"), ""]:
            hang = 2 if line.startswith(" ") else 0
            lines.append(refusals.wrapped(" " * indent + line, hang=hang))
    return "\n".join(lines[:-1])


def text(name: str) -> str:
    """The fields of the section called ``name``, for a terminal; "config" has all sections.

    Raises:
      ValueError: there is no such section.
    """
    known = dict(sections())
    if name not in known:
        choices = f"choose from {listed(name, known)}"
        raise ValueError(f"--help={name}: {hint(name, known, choices)}")
    lines = []
    for section_name, section in known.items():
        if name != "config" and not f"{section_name}.".startswith(f"{name}."):
            continue
        lines.append(f"\n{filled(f'{section_name}: {first_sentence(section)}', 0)}\n")
        for row in rows(section):
            lines.append(f"  --config.{row.name}={row.default}")
            wanted = f"{row.meaning} ({row.needs})" if row.needs else row.meaning
            lines.append(refusals.wrapped(f"{'':6}{plain(wanted)}", hang=0))
        origin = _origin(section)
        if origin is not None:
            lines.append(f"\n  {_choice(section) or origin.__name__}:\n")
            lines.append(filled(inspect.getdoc(origin) or "", 6))
    return "\n".join(lines)


def first_sentence(section: Section) -> str:
    return " ".join((inspect.getdoc(type(section)) or "").partition("\n\n")[0].split())
