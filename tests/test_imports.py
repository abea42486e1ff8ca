"""The layout, enforced on the syntax tree: who imports whom, and where an SDE's type is known."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import sbml
from sbml.sdes import SDES

ROOT = Path(sbml.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
    if path != ROOT / "__init__.py"
}

# The folders and files at the top. The docstring of each folder says what it may import;
# ``program`` has folders inside, between which there is only the rule of no circle.
LAYERS = sorted({module.split(".")[0] for module in MODULES} - {"__main__"})
OF_FILES = {
    "losses": {"core", "sdes"},
    "main": {"core", "program"},
}
PURE = (
    *(module for module in MODULES if module.split(".")[0] in ("sdes", "statistics")),
    *"""
    audit.oracle core.bits core.pytrees core.scalars core.types likelihood.flow likelihood.ode
    likelihood.quadrature losses samplers._grid samplers.probability_flow score.divergence
    """.split(),
)
NETWORK_LIBRARIES = {"flax", "equinox", "haiku", "optax", "orbax", "grain", "ml_collections"}


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(), str(MODULES[module]))


def imports(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that a file imports, in functions too; ``from a import b`` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import on line {node.lineno}: write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(name: str) -> set[str]:
    """What the layer ``name`` may import: the list after "May import:" in its docstring."""
    if name in OF_FILES:
        return OF_FILES[name]
    text = ast.get_docstring(tree_of(name)) or ""
    _, found, names = text.partition("May import: ")
    assert found, f"the docstring of sbml/{name}/__init__.py lacks the list 'May import: ...'"
    return set(re.findall(r"\w+", names.partition(".")[0])) & set(LAYERS)


def arrows(modules: Iterable[str], depth: int) -> dict[str, set[str]]:
    """What the files of each part import of other parts; a part is the first ``depth`` names."""
    found: dict[str, set[str]] = {}
    for module in modules:
        own = ".".join(module.split(".")[:depth])
        names = (name.split(".")[1:] for name in imports(tree_of(module)) if "sbml." in name)
        targets = {".".join(name[:depth]) for name in names if name[0] in LAYERS}
        found.setdefault(own, set()).update(targets - {own})
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_a_folder_imports_what_its_docstring_says(name: str) -> None:
    """No more, and no less: otherwise the docstrings would not show the architecture."""
    used = arrows((m for m in MODULES if m.split(".")[0] == name), 1)[name]
    assert used == allowed(name) & used, f"{name} also imports {used - allowed(name)}"
    assert used == allowed(name), f"{name} does not import {allowed(name) - used}"


def test_the_folders_import_each_other_in_one_order() -> None:
    graph = arrows((m for m in MODULES if m != "__main__"), 1)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle.
    assert all("program" not in graph[name] for name in LAYERS if name not in ("program", "main"))


def test_the_folders_of_the_program_import_each_other_in_one_order() -> None:
    graph = arrows((m for m in MODULES if m.startswith("program.")), 2)
    tuple(graphlib.TopologicalSorter(graph).static_order())


def test_the_top_of_the_package_fits_on_a_screen() -> None:
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 18


@pytest.mark.parametrize("module", MODULES)
def test_the_package_stands_alone(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(tree_of(module))}
    assert not outside & {"experiments", "tests", "benchmarks", "configs", "oracle", "conftest"}


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_knows_no_network_library(module: str) -> None:
    found = set(imports(tree_of(module)))
    if module == "likelihood.ode":
        # The base of diffrax, for an error of its own kind.
        found = {name for name in found if not name.startswith("equinox.internal")}
    assert not NETWORK_LIBRARIES & {name.split(".")[0] for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_configs_are_read_above_the_building_blocks(module: str) -> None:
    if any(name.split(".")[0] == "ml_collections" for name in imports(tree_of(module))):
        assert module.split(".")[0] in {"program", "main"}


def sde_branches(tree: ast.Module) -> Iterator[str]:
    """Where a file names an SDE's class, tests its type, or compares with its registry name."""
    classes = {kind.__name__ for kind in SDES.values()}

    def is_sde(node: ast.AST) -> bool:
        return any(
            isinstance(n, ast.Name | ast.Attribute)
            and (n.id if isinstance(n, ast.Name) else n.attr) in {"sde", "SDE"}
            for n in ast.walk(node)
        )

    for node in ast.walk(tree):
        line = f"line {getattr(node, 'lineno', '?')}"
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            if name in classes:
                yield f"{line}: the class {name}"
        elif isinstance(node, ast.ImportFrom) and node.module == "sbml.sdes":
            yield from (f"{line}: {a.name}" for a in node.names if a.name in classes)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            tests_type = node.func.id in {"isinstance", "issubclass", "type"}
            if tests_type and any(is_sde(argument) for argument in node.args):
                yield f"{line}: {node.func.id}() of an SDE"
        elif isinstance(node, ast.Compare | ast.MatchValue):
            constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
            yield from (f"{line}: compared with {name!r}" for name in constants & set(SDES))


# The modules that may make SDEs: ``sdes``, and the readers of schedules in other codes' files.
MAKES_SDES = {m for m in MODULES if m.split(".")[0] == "sdes"} | {
    "program.convert.vdm",
    "program.convert.diffusers",
}


@pytest.mark.parametrize("module", sorted(set(MODULES) - MAKES_SDES))
def test_no_branch_on_the_type_of_an_sde(module: str) -> None:
    assert not list(sde_branches(tree_of(module)))


@pytest.mark.parametrize(
    "source",
    [
        "if isinstance(sde, VESDE): pass",
        "if isinstance(x, sdes.VP): pass",
        "from sbml.sdes import SubVP",
        "if type(self.sde) is kind: pass",
        "if config.sde.name == 'vp': pass",
        "if name in ('ve', 'linear_ve'): pass",
        "match name:\n  case 'subvp': pass",
    ],
)
def test_branches_are_recognised(source: str) -> None:
    assert list(sde_branches(ast.parse(source)))


def test_the_library_is_there_once_the_package_is_imported() -> None:
    """A module of it is imported when its name is first used, and not before."""
    code = "import sys, sbml; assert 'jax' not in sys.modules; sbml.losses.dsm; sbml.Density"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(sbml, name) for name in (*sbml.LIBRARY, *sbml.NAMES))
    with pytest.raises(
        AttributeError, match="no attribute 'loses'; it has Density, Estimate, load, VP"
    ):
        sbml.loses  # noqa: B018


# Packages of the program, such as those that read image sets: the library must not import them.
OF_THE_PROGRAM = set(
    "PIL grain jinja2 matplotlib ml_collections optax orbax skimage sklearn tensorboardX "
    "tensorflow tensorflow_datasets".split()
)
# Packages of networks and solvers, and the slow part of SciPy: a loss must not import them.
OF_DENSITIES = {"flax", "equinox", "diffrax", "scipy.interpolate"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "unneeded"),
    [("losses", OF_THE_PROGRAM | OF_DENSITIES), ("Density, sbml.Estimate", OF_THE_PROGRAM)],
)
def test_the_library_imports_only_what_it_needs(names: str, unneeded: set[str]) -> None:
    code = f"import sys, sbml; sbml.{names}; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], check=True, text=True, capture_output=True
    )
    imported = set(result.stdout.split())
    assert {"jax", "sbml.losses"} <= imported
    assert not unneeded & imported
