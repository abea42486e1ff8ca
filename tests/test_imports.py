"""The layout, enforced on the syntax tree: who imports whom, and where an SDE's type is known."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
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

# What each folder may import, in addition to itself and the library. The library is the folder
# ``sdes`` and the files at the top except ``main``. Each row but the first names folders of rows
# above it only, so no import goes in a circle. A new folder needs a row here.
LAYERS: dict[str, set[str]] = {
    "library": {"networks", "dequantizers", "estimators", "samplers"},
    **dict.fromkeys(("networks", "dequantizers", "samplers"), set()),
    "estimators": {"dequantizers"},
    **dict.fromkeys(("codec", "runtime"), set()),
    "data": {"runtime"},
    "features": {"data", "runtime"},
    "report": {"data", "estimators", "runtime"},
    "experiment": {"data", "dequantizers", "estimators", "features", "networks", "runtime"}
    | {"samplers"},
    "evaluation": {"codec", "data", "dequantizers", "estimators", "experiment", "report"}
    | {"runtime", "samplers"},
    "audit": {"codec", "data", "dequantizers", "estimators", "evaluation"},
    "convert": {"dequantizers", "experiment", "networks", "runtime"},
    "modes": {"audit", "codec", "convert", "data", "dequantizers", "evaluation", "experiment"}
    | {"features", "report", "runtime", "samplers"},
    "main": {"experiment", "modes", "runtime"},
}
PURE = (
    *(module for module in MODULES if module.split(".")[0] == "sdes"),
    "types",
    "times",
    "divergence",
    "bits",
    "ode",
    "losses",
    "likelihood",
    "samplers._grid",
    "samplers.probability_flow",
    "audit.oracle",
    "quadrature",
    "scalars",
    "pytrees",
    "second_order",
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


def layer(module: str) -> str:
    """The row of ``module``, given without the package's name: its folder, ``main``, or library."""
    first = module.split(".")[0]
    own_row = first == "main" or ((ROOT / first).is_dir() and first != "sdes")
    return first if own_row else "library"


def uses(name: str) -> set[str]:
    """The other layers that the files of layer ``name`` import."""
    found = {
        layer(imported.removeprefix("sbml."))
        for module in MODULES
        if layer(module) == name
        for imported in imports(tree_of(module))
        if imported.startswith("sbml.")
    }
    return found - {name}


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down_the_layers_only(name: str) -> None:
    assert uses(name) - {"library"} <= LAYERS[name]


@pytest.mark.parametrize("name", LAYERS)
def test_every_allowed_import_exists(name: str) -> None:
    """Otherwise the table would not show the architecture."""
    assert LAYERS[name] - {"networks", "samplers"} <= uses(name) | {"library"}


def test_every_folder_is_a_layer() -> None:
    assert {layer(module) for module in MODULES} == set(LAYERS)


def test_the_files_of_the_library_import_each_other_in_one_order() -> None:
    """Files at the top, and the kinds' folders as one file each: no circle."""
    library = {"library", "codec", "networks", "dequantizers", "estimators", "samplers"}
    arrows: dict[str, set[str]] = {}
    for module in (m for m in MODULES if layer(m) in library):
        targets = {name.split(".")[1] for name in imports(tree_of(module)) if "sbml." in name}
        arrows.setdefault(module.split(".")[0], set()).update(targets - {module.split(".")[0]})
    tuple(graphlib.TopologicalSorter(arrows).static_order())  # CycleError names the circle.


@pytest.mark.parametrize("module", MODULES)
def test_the_package_stands_alone(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(tree_of(module))}
    assert not outside & {"experiments", "tests", "benchmarks", "configs", "oracle", "conftest"}


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_knows_no_network_library(module: str) -> None:
    found = set(imports(tree_of(module)))
    if module == "ode":
        # The base of diffrax, for an error of its own kind.
        found = {name for name in found if not name.startswith("equinox.internal")}
    assert not NETWORK_LIBRARIES & {name.split(".")[0] for name in found}


@pytest.mark.parametrize("module", MODULES)
def test_configs_are_read_above_the_building_blocks(module: str) -> None:
    if any(name.split(".")[0] == "ml_collections" for name in imports(tree_of(module))):
        assert layer(module) in {"experiment", "evaluation", "convert", "modes", "main"}


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
    "convert.vdm",
    "convert.diffusers",
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
    """
    tensorflow tensorflow_datasets skimage sklearn matplotlib PIL orbax grain tensorboardX
    jinja2 optax ml_collections
    """.split()
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
