"""The pages of the reference, one for each public module, written when the documentation is built.

A module that joins ``sbml.LIBRARY`` thereby joins the reference. Its page has the module's
docstring, its base classes, functions and other classes, the types that it gives names to and the
dictionaries of its kinds (such as ``SDES``). After those of a package come its public modules, with
the kinds that are defined there, under the names that the package gives them. Pages written by
hand, in the folder ``api``, group the pages by task.
"""

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import sbml

FOLDER = "reference"
# Functions and classes that other files of the package need, and users do not.
INTERNAL = {
    "sbml.core.bits": "check_pixels, check_dequantized",
    "sbml.codec.bits_back": "coder, installed",
    "sbml.codec.file": "as_integers, packed",
    "sbml.core.compiler": "version, needs_cure, knows, with_flags",
    "sbml.data": "source_of",
    "sbml.data.image_folder": "printable",
    "sbml.data.imagenet32": "version, check_comparable",
    "sbml.data.photos": "photo_path",
    "sbml.dequantizers.base": "has_density, has_bound, is_trained",
    "sbml.dequantizers.variational": "from_reference, read_options, image_shape",
    "sbml.density.checks": (
        "check_sde, is_shape, check_condition_shape, continuous, integers, conditions, as_arrays, "
        "count, probabilities, some"
    ),
    "sbml.density.distribution": "vectorised, How, Distribution",
    "sbml.density.estimate": "excess",
    "sbml.density.estimators.base": "draw_key, times_key",
    "sbml.density.estimators.ode": "averaged",
    "sbml.statistics.moments": "rows",
    "sbml.networks.ncsnpp": "ResnetBlockDDPMpp, ResnetBlockBigGANpp, AttnBlockpp, Combine",
    "sbml.networks.unet2d": ("fields, params, TimeEmbedding, Resnet, Attention, Down, Middle, Up"),
    "sbml.networks.vdm": "default_groups, Block, Attention",
    "sbml.likelihood.ode": (
        "check_tolerances, check_precision, growth, most_evaluations, last_time, rms_norm"
    ),
    "sbml.likelihood.quadrature": "lobatto_error, lone_step_error",
    "sbml.core.types": (
        "at_least_float32, full_precision, in_full_precision, half_precision, check_function"
    ),
}


def parts(name: str) -> list[str]:
    """The modules in the package ``name`` that have no page of their own, and whose names do not
    begin with an underscore."""
    path = getattr(importlib.import_module(name), "__path__", None)
    found = [f"{name}.{m.name}" for m in (pkgutil.iter_modules(path) if path else ())]
    own = set(sbml.LIBRARY.values())
    return [part for part in found if not (part in own or part.rpartition(".")[2][0] == "_")]


PAGES = {name: parts(name) for name in sbml.LIBRARY.values()}
MODULES = {"sbml", *PAGES, *(part for found in PAGES.values() for part in found)}


def constants(name: str) -> list[tuple[str, str, str]]:
    """(name, value, comment) of the types and dictionaries at the top of module ``name``.

    Of a dictionary the value is the names in it.
    """
    module = importlib.import_module(name)
    source = inspect.getsource(module)
    lines, found = source.split("\n"), []
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if not isinstance(target, ast.Name) or target.id.startswith("_"):
            continue
        value = getattr(module, target.id)
        if not (is_type(target.id) or isinstance(value, dict)):
            continue
        comment, above = [], node.lineno - 2
        while above >= 0 and lines[above].startswith("# "):
            comment.insert(0, lines[above][2:])
            above -= 1
        end = lines[(node.end_lineno or node.lineno) - 1][node.end_col_offset :]
        comment += [end.partition("#")[2].strip()] if "#" in end else []
        text = ", ".join(map(str, value)) if isinstance(value, dict) else ast.unparse(node.value)
        found.append((target.id, text, " ".join(comment)))
    return found


def is_type(name: str) -> bool:
    """Whether ``name`` is that of a type, such as ``Score``, and not of another constant."""
    return name[0].isupper() and not (name.isupper() and len(name) > 1)


def constant(name: str, value: str, comment: str) -> str:
    """The entry of a constant, or of a type."""
    kind = "type" if is_type(name) else "data"
    shown = f"``{value}``" if len(value) < 200 else ""
    return f".. py:{kind}:: {name}\n\n" + "".join(f"   {t}\n\n" for t in (shown, comment) if t)


TYPES = {(module, name) for module in MODULES for name, *_ in constants(module) if is_type(name)}


def own(name: str) -> dict[str, Any]:
    """The functions and classes that module ``name`` defines, with a docstring, in their order."""
    hidden = INTERNAL.get(name, "").split(", ")
    return {
        member: value
        for member, value in vars(importlib.import_module(name)).items()
        if (inspect.isclass(value) or inspect.isroutine(value))
        and value.__module__ == name
        and value.__doc__
        and not (member.startswith("_") or member in hidden)
    }


def exported(name: str) -> dict[str, Any]:
    """The functions and classes of other modules that the package ``name`` hands on, by
    ``from module import member as member``."""
    module = importlib.import_module(name)
    imports = [
        n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.ImportFrom)
    ]
    members = [each.name for n in imports for each in n.names if each.name == each.asname]
    values = {member: getattr(module, member) for member in members}
    return {
        member: value
        for member, value in values.items()
        if (inspect.isclass(value) or inspect.isroutine(value))
        and value.__module__ not in {name, *sbml.LIBRARY.values()}
    }


def is_base(value: Any) -> bool:
    """Whether ``value`` is a protocol or an abstract class."""
    return inspect.isabstract(value) or bool(getattr(value, "_is_protocol", False))


def entries(module: str, members: dict[str, Any]) -> str:
    """The entries of ``members``: the class that the module is named after, base classes,
    functions, other classes."""

    def rank(member: str) -> int:
        if member.lower() == module.rpartition(".")[2].removesuffix("s"):
            return 0
        kinds = (is_base, inspect.isroutine, inspect.isclass)
        return 1 + [kind(members[member]) for kind in kinds].index(True)

    found = []
    for member in sorted(members, key=rank):
        value = members[member]
        kind = "class" if inspect.isclass(value) else "function"
        if kind == "class" and issubclass(value, BaseException):
            kind = "exception"
        options = "" if kind == "function" else "\n   :members:"
        if any(base.__name__ == "Distribution" for base in getattr(value, "__bases__", ())):
            options += "\n   :inherited-members: object"
        found.append(f".. auto{kind}:: {module}.{member}{options}\n\n")
    return "".join(found)


def section(name: str, underline: str, text: str) -> str:
    """The part of a page that is about module ``name``; ``text`` has the entries."""
    text = f"{name}\n{underline * len(name)}\n\n.. automodule:: {name}\n\n{text}"
    return text + "".join(constant(*each) for each in constants(name))


def page(name: str) -> str:
    """The page of module ``name`` in reStructuredText."""
    public = exported(name)
    first = {
        member: value
        for member, value in public.items()
        if inspect.isroutine(value) or is_base(value) or value.__module__ not in PAGES[name]
    }
    sections = [section(name, "=", entries(name, own(name) | first))]
    for part in PAGES[name]:
        here = {m: v for m, v in own(part).items() if v is public.get(m) and m not in first}
        rest = {m: v for m, v in own(part).items() if v is not public.get(m)}
        sections.append(section(part, "-", entries(name, here) + entries(part, rest)))
    return "\n\n".join(sections)


def write(app: Sphinx) -> None:
    """Write the pages that have changed, so that Sphinx reads only these again."""
    folder = Path(app.srcdir) / FOLDER
    folder.mkdir(exist_ok=True)
    pages = {f"{short}.rst": page(name) for short, name in sbml.LIBRARY.items()}
    for path in folder.glob("*.rst"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
