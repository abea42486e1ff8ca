"""A Sphinx extension that converts docstrings, plain text with formulas, to reStructuredText.

Indented paragraphs become equations (``formulas``) or tables if all of their lines are formulas or
have columns. The others become literal blocks, which keep every space.
Sections such as ``Args:`` become lists. Characters that reStructuredText would read as markup, such
as the bars of |x|, are escaped outside of ``literals`` and :roles:`...`. Types have the names that
they have in the source: ``Example`` and not ``Float[Array, '*s']``. Types with conditions are shown
without the conditions.
"""

import contextlib
import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any

from formulas import NoFormula, latex
from reference import MODULES, TYPES
from sentences import formulas
from sphinx.application import Sphinx

import sbml
from sbml.core import types as vocabulary

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ITEM = re.compile(r"  ([\w, ]+): (.*)", re.S)
# Markup that is kept: literals, roles, **strong** and *emphasis* that begins and ends at a word.
MARKUP = re.compile(
    r"``.+?``|\*\*[A-Za-z][^*]*\*\*|:[\w:]+:`[^`]+`"
    r"|(?<![\w*(^])\*[A-Za-z][^*`]{0,60}[\w.,]\*(?![\w*])",
    re.S,
)
# The first cell of a row: at most three words, or a call.
HEAD = re.compile(r"[\w.]+\(.*\)|[\w.-]+,?(?: [\w.-]+,?){0,2}")
MODULE = re.compile(r"``sbml\.(\w+(?:\.\w+)*)``")


def escape(text: str) -> str:
    """``text`` with a backslash before each character that a docstring does not mean as markup."""
    text = re.sub(r"([\\|*])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def prose(text: str) -> str:
    """A paragraph as reStructuredText; names of documented modules become links."""
    parts, end = [], 0
    for match in MARKUP.finditer(text):
        name = MODULE.fullmatch(match[0])
        module = sbml.LIBRARY.get(name[1], f"sbml.{name[1]}") if name else ""
        markup = f":py:mod:`{module}`" if module in MODULES else match[0]
        parts += [sentence(text[end : match.start()]), markup]
        end = match.end()
    return "".join([*parts, sentence(text[end:])])


def sentence(text: str) -> str:
    """Text without markup as reStructuredText, with its formulas."""
    parts, end = [], 0
    for span, tex in formulas(text):
        parts += [escape(text[end : span.start]), f":math:`{tex}`"]
        end = span.end
    return "".join([*parts, escape(text[end:])])


def section(name: str, text: str) -> str:
    """A section such as ``Args``, whose text is indented by two spaces, as reStructuredText.

    Its items are ``name: text`` or ``name, name: text``. The further lines of an item are indented
    more.

    Raises:
      ValueError: if an item has another form.
    """
    if name in ("Returns", "Yields"):
        return f":{name}:\n{textwrap.indent(prose(textwrap.dedent(text)), '   ')}"
    items = []
    for item in re.split(r"\n(?=  \w)", text):
        if not (match := ITEM.fullmatch(item)):
            raise ValueError(f"{name} of a docstring has {item!r}: write it as name: text")
        names = ", ".join(f"**{each.strip()}**" for each in match[1].split(","))
        body = prose(re.sub(r"\s*\n\s*", " ", match[2]))
        items.append(f"   - {names} – {body}")
    return "\n".join([f":{name}:", *items])


def block(paragraph: str) -> str:
    """An indented paragraph as reStructuredText."""
    for convert in (equations, table):
        with contextlib.suppress(NoFormula):
            return convert(textwrap.dedent(paragraph))
    return ".. code-block:: text\n\n" + paragraph


def equations(paragraph: str) -> str:
    """A paragraph of formulas, one on a line, as reStructuredText.

    Raises:
      NoFormula: if a line of it is none.
    """
    lines: list[str] = []
    for line in paragraph.split("\n"):
        if lines and len(re.findall(r"[(\[]", lines[-1])) > len(re.findall(r"[)\]]", lines[-1])):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(line)
    rows = [latex(line) for line in lines]
    if len(rows) > 1:
        rows = [r"\begin{aligned}", " \\\\ ".join(rows), r"\end{aligned}"]
    return f".. math::\n\n   {' '.join(rows)}"


def table(paragraph: str) -> str:
    """A paragraph with columns, between which there are two spaces, as reStructuredText.

    The first cell of a row is a name. A line without one goes on with the cells above it.

    Raises:
      NoFormula: if the lines do not have the same columns.
    """
    rows: list[dict[int, list[str]]] = []
    for line in paragraph.split("\n"):
        cells = {m.start(): m[0] for m in re.finditer(r"\S+(?: \S+)*", line)}
        rows += [{}] if 0 in cells else []
        for column, text in cells.items():
            rows[-1].setdefault(column, []).append(text)
    columns = sorted(set().union(*rows))
    heads = [row[0][0] for row in rows]
    if (
        len(rows) < 2
        or min(map(len, rows)) < 2
        or any(sum(column in row for row in rows) < 2 for column in columns)
        or not all(map(HEAD.fullmatch, heads))
        or re.search(r"[^\x00-\x7f]|  #", paragraph)
    ):
        raise NoFormula(paragraph)
    names = any(re.search(r"[_.(]", head) for head in heads)  # those of Python, or of a config
    lines = [
        ".. list-table::",
        "   :class: docstring",
        *(["   :header-rows: 1"] if heads[0] == "kind" else []),
        "",
    ]
    for head, row in zip(heads, rows, strict=True):
        lines.append(f"   * - {f'``{head}``' if names else prose(head)}")
        lines += [f"     - {cell(row.get(column, ['']))}" for column in columns[1:]]
    return "\n".join(lines)


def cell(lines: list[str]) -> str:
    """A cell of a table: formulas, one on a line; prose, which may begin with a formula; or ""."""
    with contextlib.suppress(NoFormula):
        rows = [f":math:`{latex(line)}`" for line in lines]
        return rows[0] if len(rows) == 1 else "\n       ".join(f"| {row}" for row in rows)
    text = " ".join(lines)
    for match in re.finditer(r": |\. | \((?=[A-Za-z]{3,}[ ,)])|, (?=where|for)", text):
        with contextlib.suppress(NoFormula):
            return f":math:`{latex(text[: match.start()])}`\\ {prose(text[match.start() :])}"
    return prose(text)


def to_restructuredtext(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText."""
    result: list[str] = []
    item = False  # whether the last paragraph is an item of a list, which this one may continue
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        first, _, rest = paragraph.partition("\n")
        if match := SECTION.fullmatch(first):
            result += [section(match[1], rest)]
        elif not first.startswith(" ") or item:
            item = item or first.startswith("- ")
            result += [prose(paragraph)]
        else:
            result += [block(paragraph)]
    return "\n\n".join(result).split("\n") + [""]


def aliases(module: Any) -> dict[Any, Any]:
    """Stand-ins for the types of arrays to which ``module`` gives a name.

    A stand-in is an empty class with this name. Its module is the public module that documents the
    type, so that Sphinx makes a link to it.

    Returns:
      {type: stand-in}.
    """
    stand_ins: dict[Any, Any] = {}
    for name, value in vars(module).items():
        if name[0].isupper() and is_alias(value):
            homes = [m for m in (module.__name__, *sorted(MODULES)) if (m, name) in TYPES]
            if homes:
                stand_ins.setdefault(value, type(name, (), {"__module__": homes[0]}))
    return stand_ins


def is_alias(value: Any) -> bool:
    """Whether ``value`` is a type of arrays, a union with such a type, or a ``Callable``."""
    if typing.get_origin(value) in (typing.Union, types.UnionType):
        return any(is_alias(argument) for argument in typing.get_args(value))
    if typing.get_origin(value) is Callable:
        return True
    return inspect.isclass(value) and value.__module__ == "jaxtyping" and "[" in value.__name__


def with_stand_ins(annotation: Any, stand_ins: dict[Any, Any]) -> Any:
    """``annotation`` with every type in ``stand_ins`` replaced by its stand-in."""
    if isinstance(annotation, list):  # the arguments of a Callable
        return [with_stand_ins(a, stand_ins) for a in annotation]
    if annotation in stand_ins:
        return stand_ins[annotation]
    if typing.get_origin(annotation) is typing.Annotated:  # Docstrings state the conditions.
        kind = typing.get_args(annotation)[0]
        # A number may also be a scalar array.
        return float if float in typing.get_args(kind) else with_stand_ins(kind, stand_ins)
    arguments = typing.get_args(annotation)
    if not arguments:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for value, stand_in in stand_ins.items():
            if typing.get_origin(value) not in (typing.Union, types.UnionType):
                continue
            parts = typing.get_args(value)
            if set(parts) < set(arguments):
                rest = [with_stand_ins(a, stand_ins) for a in arguments if a not in parts]
                return typing.Union[(stand_in, *rest)]
        return typing.Union[tuple(with_stand_ins(a, stand_ins) for a in arguments)]  # noqa: UP007
    if isinstance(annotation, types.GenericAlias):
        return annotation.__origin__[tuple(with_stand_ins(a, stand_ins) for a in arguments)]
    return annotation


def functions(kind: type) -> list[Any]:
    """The functions of a class: its methods, and those behind its properties."""
    members = [getattr(m, "__func__", getattr(m, "fget", m)) for m in vars(kind).values()]
    return [kind, *(m for m in members if inspect.isfunction(m))]


def name_types(app: Sphinx) -> None:
    """Replace types in the annotations of all public modules by the names of the types there."""
    for module in map(sys.modules.get, sorted(MODULES)):
        for value in list(vars(module).values()):
            home = sys.modules.get(str(getattr(value, "__module__", "")))
            if home is None or not home.__name__.startswith("sbml"):
                continue
            stand_ins = {**aliases(home), **aliases(vocabulary)}
            parts = functions(value) if inspect.isclass(value) else [value]
            for each in (p for p in parts if inspect.isclass(p) or inspect.isroutine(p)):
                if isinstance(hints := getattr(each, "__annotations__", None), dict):
                    each.__annotations__ = {
                        name: with_stand_ins(a, stand_ins) for name, a in hints.items()
                    }


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Convert the docstring ``lines`` of an object of this package in place."""
    if str(getattr(obj, "__module__", "sbml")).startswith("sbml"):
        lines[:] = to_restructuredtext(lines)
    # Python gives this docstring to a field of a NamedTuple that has none.
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def is_repetition(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Whether the docstring of a member only points to another class: such a member is left out."""
    text = inspect.getdoc(getattr(obj, "fget", obj)) or ""
    return True if re.fullmatch(r"See ``\w+``\.", text) else None


def signature(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, arguments: str, result: str
) -> tuple[str, str]:
    """The signature without that of a protocol, and without defaults that are no Python, such as
    ``<factory>``: Sphinx would not make links in it."""
    if getattr(obj, "_is_protocol", False):
        return "", result
    return arguments and re.sub(r"<(?:[^<>]|<[^<>]*>)*>", "...", arguments), result


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-skip-member", is_repetition)
    app.connect("autodoc-process-signature", signature)
    app.connect("builder-inited", name_types)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
