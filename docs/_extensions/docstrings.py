"""Docstrings are plain text with indented formulas; here they become reStructuredText.

Indented paragraphs become literal blocks, so that formulas and aligned tables keep their columns;
sections such as ``Args:`` become lists.
Characters that reStructuredText would read as markup, as the bars of |x|, are escaped outside of
``literals`` and :roles:`...`. Types are named as the source names them: ``Example`` and not
``Float[Array, '*s']``.
"""

import inspect
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable
from typing import Any

from reference import MODULES, TYPES
from sphinx.application import Sphinx

from sbml import types as vocabulary

SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields):$")
ITEM = re.compile(r"  ([\w, ]+): (.*)", re.S)
# What stays as it is: literals, roles, and *emphasis* that begins and ends at a word.
MARKUP = re.compile(
    r"``.+?``|\*\*[A-Za-z][^*]*\*\*|:[\w:]+:`[^`]+`"
    r"|(?<![\w*(^])\*[A-Za-z][^*`]{0,60}[\w.]\*(?![\w*])",
    re.S,
)
MODULE = re.compile(r"``(sbml(?:\.\w+)+)``")


def escaped(text: str) -> str:
    """``text`` with the characters escaped that are no markup in a docstring."""
    text = re.sub(r"([\\|*])", r"\\\1", text)
    return re.sub(r"(?<=\w)_(?!\w)", r"\\_", text)


def prose(text: str) -> str:
    """A paragraph as reStructuredText; names of documented modules become links."""
    found, end = [], 0
    for match in MARKUP.finditer(text):
        name = MODULE.fullmatch(match[0])
        kept = f":py:mod:`{name[1]}`" if name and name[1] in MODULES else match[0]
        found += [escaped(text[end : match.start()]), kept]
        end = match.end()
    return "".join([*found, escaped(text[end:])])


def section(name: str, text: str) -> str:
    """The field of a section such as ``Args``, whose text is indented by two spaces.

    Its items are ``name: text`` or ``name, name: text``, and further lines are indented more.
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


def converted(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText."""
    result: list[str] = []
    item = False  # whether the last paragraph is the item of a list, which may go on
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        first, _, rest = paragraph.partition("\n")
        if match := SECTION.fullmatch(first):
            result += [section(match[1], rest)]
        elif not first.startswith(" ") or item:
            item = item or first.startswith("- ")
            result += [prose(paragraph)]
        else:
            result += [".. code-block:: text\n\n" + paragraph]
    return "\n\n".join(result).split("\n") + [""]


def aliases(module: Any) -> dict[Any, Any]:
    """Stand-ins for the types that ``module`` has a name for, by the types.

    A stand-in is known by the name of the public module that defines it: there it is documented.
    """
    found: dict[Any, Any] = {}
    for name, value in vars(module).items():
        if name[0].isupper() and is_alias(value):
            homes = [m for m in (module.__name__, *sorted(MODULES)) if (m, name) in TYPES]
            if homes:
                found.setdefault(value, type(name, (), {"__module__": homes[0]}))
    return found


def is_alias(value: Any) -> bool:
    """Whether ``value`` is a type of arrays or a union of them, not a class or None."""
    if typing.get_origin(value) in (typing.Union, types.UnionType):
        return any(is_alias(argument) for argument in typing.get_args(value))
    if typing.get_origin(value) is Callable:
        return True
    return inspect.isclass(value) and value.__module__ == "jaxtyping" and "[" in value.__name__


def named(annotation: Any, known: dict[Any, Any]) -> Any:
    """``annotation`` with every type in ``known`` replaced by its stand-in."""
    if isinstance(annotation, list):  # the arguments of a Callable
        return [named(a, known) for a in annotation]
    if annotation in known:
        return known[annotation]
    arguments = typing.get_args(annotation)
    if not arguments:
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for value, stand_in in known.items():
            if typing.get_origin(value) not in (typing.Union, types.UnionType):
                continue
            parts = typing.get_args(value)
            if set(parts) < set(arguments):
                rest = [named(a, known) for a in arguments if a not in parts]
                return typing.Union[(stand_in, *rest)]
        return typing.Union[tuple(named(a, known) for a in arguments)]  # noqa: UP007
    if isinstance(annotation, types.GenericAlias):
        return annotation.__origin__[tuple(named(a, known) for a in arguments)]
    return annotation


def functions(kind: type) -> list[Any]:
    """The functions of a class: its methods, and those behind its properties."""
    members = [getattr(m, "__func__", getattr(m, "fget", m)) for m in vars(kind).values()]
    return [kind, *(m for m in members if inspect.isfunction(m))]


def name_types(app: Sphinx) -> None:
    """Annotations of all public modules by the names that the modules have for types."""
    for module in map(sys.modules.get, sorted(MODULES)):
        for value in list(vars(module).values()):
            home = sys.modules.get(str(getattr(value, "__module__", "")))
            if home is None or not home.__name__.startswith("sbml"):
                continue
            known = {**aliases(home), **aliases(vocabulary)}
            parts = functions(value) if inspect.isclass(value) else [value]
            for each in (p for p in parts if inspect.isclass(p) or inspect.isroutine(p)):
                if isinstance(found := getattr(each, "__annotations__", None), dict):
                    each.__annotations__ = {name: named(a, known) for name, a in found.items()}


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if str(getattr(obj, "__module__", "sbml")).startswith("sbml"):
        lines[:] = converted(lines)
    if lines and lines[0].startswith("Alias for field number"):  # of a NamedTuple
        lines.clear()


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("builder-inited", name_types)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
