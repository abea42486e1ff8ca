"""All fields of a config, from the lines that define them: for ``--help=eval`` and for the
documentation.

    python -m sbml.experiment.reference > docs/fields.md
"""

import inspect
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

from sbml.experiment.config import Config
from sbml.experiment.fields import Chosen, Section, needs


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
        shown = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        if name in known and (meaning := known[name].description):
            wanted = needs(known[name].annotation, known[name].metadata)
        else:
            owner = getattr(section, section.choice) if isinstance(section, Chosen) else "its class"
            wanted, meaning = "", f"field of {owner}"
        found.append(Row(section.name_of(name), shown, wanted, meaning))
    return found


def text(name: str) -> str:
    """The fields of the section called ``name``, for a terminal; "config" has all sections."""
    known = dict(sections())
    if name not in known:
        return f"--help={name}: choose from {', '.join(known)}"
    lines = []
    for section_name, section in known.items():
        if name != "config" and not f"{section_name}.".startswith(f"{name}."):
            continue
        lines.append(f"\n{_first_sentence(section)}\n")
        for row in rows(section):
            lines.append(f"  --config.{row.name}={row.default}")
            wanted = f"{row.meaning} ({row.needs})" if row.needs else row.meaning
            lines += textwrap.wrap(wanted, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _first_sentence(section: Section) -> str:
    return " ".join((inspect.getdoc(type(section)) or "").partition("\n\n")[0].split())


INTRODUCTION = """# Fields of a config

A config file sets these fields, and `--config.FIELD=VALUE` sets them on the command line.
`--help=SECTION` shows the fields of one section in a terminal. The fields of the network, the SDE
and the dequantizer are explained by their classes.
"""


def markdown() -> str:
    """A page with a table of fields for each section."""
    parts = [INTRODUCTION]
    for name, section in sections():
        parts.append(f"## {name}\n\n{_first_sentence(section).replace('``', '`')}\n")
        parts.append("| field | default | value | meaning |\n|---|---|---|---|")
        for row in rows(section):
            texts = (f"`{row.name}`", f"`{row.default}`" if row.default else "", *row[2:])
            cells = tuple(cell.replace("``", "`").replace("|", "\\|") for cell in texts)
            parts.append(f"| {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
