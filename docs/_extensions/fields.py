"""Writes the page of the fields of a config.

python docs/_extensions/fields.py > docs/fields.md
"""

from sbml.program.config import reference

INTRODUCTION = """# Fields of a config

A config file sets these fields, and `--config.FIELD=VALUE` sets them on the command line.
`--help=SECTION` shows the fields of one section in a terminal. The fields of the network, the SDE
and the dequantizer are explained by their classes ({py:mod}`sbml.networks`, {py:mod}`sbml.sdes`,
{py:mod}`sbml.dequantizers`), whose text `--help=SECTION` also shows.
"""


def markdown() -> str:
    """A page with a list of fields for each section; the anchor of ``eval.tau`` is ``eval-tau``."""
    parts = [INTRODUCTION]
    for name, section in reference.sections():
        parts.append(f"## {name}\n\n{reference.first_sentence(section).replace('``', '`')}\n")
        for row in reference.rows(section):
            anchor = row.name.replace(".", "-").replace("_", "-")
            default = f"default `{row.default}`" if row.default else "empty by default"
            about = ", ".join(filter(None, [f"`{row.name}`{{#{anchor}}}", default, row.needs]))
            parts.append(f"{about}\n: {row.meaning.replace('``', '`')}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown(), end="")
