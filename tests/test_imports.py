"""The layout, enforced on the syntax tree: who imports whom, and where an SDE's type is known."""

import ast
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

MATHEMATICS = {"sdes", "times", "divergence"}
BELOW_BUILD = (
    MATHEMATICS
    | {"bits", "ode", "losses", "bound", "likelihood", "sampling", "adapters"}
    | {
        "networks",
        "dequantizers",
        "samplers",
        "data",
        "runtime",
        "config",
        "from_config",
        "baselines",
        "intervals",
        "discrete",
        "estimators",
        "architecture",
        "trained",
        "moments",
    }
)
MODES = {
    "train",
    "train_dequantizer",
    "evaluate",
    "sample",
    "latents",
    "quality",
    "convert",
    "verify",
}

# What every module may import: names, the platform, and the check of XLA's sums.
VOCABULARY = {"types", "platform", "compiler"}

# What a module may import from the package, beside VOCABULARY and the files of its own folder.
# The longest matching name decides; a new module at the top needs a row of its own.
ALLOWED: dict[str, set[str]] = {
    **dict.fromkeys(("types", "sdes", "divergence", "bits", "intervals", "trees"), set()),
    **dict.fromkeys(("convolution", "data", "platform", "compiler"), set()),
    **dict.fromkeys(("networks", "dequantizers"), {"convolution"}),
    **dict.fromkeys(("quadrature", "moments"), set()),
    **dict.fromkeys(("times", "adapters", "oracle"), {"sdes"}),
    "ode": {"quadrature", "sdes"},
    "losses": {"sdes"},
    "bound": MATHEMATICS | {"losses", "moments"},
    "discrete": {"bits", "bound", "dequantizers", "sdes", "times"},
    "likelihood": {"divergence", "ode", "sdes"},
    "sampling": {"ode", "sdes"},
    "samplers": {"ode", "sampling", "sdes"},
    "baselines": {"bits", "moments"},
    "estimators": {"bits", "bound", "discrete", "divergence", "likelihood", "ode", "sdes"},
    "checks": MATHEMATICS
    | {"bits", "bound", "dequantizers", "discrete", "likelihood", "losses", "ode", "oracle"},
    "verify": {"sdes", "checks", "runtime"},
    "config": {"networks"},
    "from_config": {"data", "networks", "ode", "runtime", "samplers", "sdes", "times"}
    | {"config", "dequantizers", "discrete", "divergence", "estimators"},
    "runtime": set(),
    "runtime.ncsnpp_options": {"networks", "trees"},
    "architecture": set(),
    "trained": {"architecture", "data", "from_config"},
    "build": BELOW_BUILD,
    "summary": {"data", "runtime"},
    **dict.fromkeys(("loop", "cells"), BELOW_BUILD | {"build"}),
    "sample": BELOW_BUILD | {"build", "summary", "trained"},
    "latents": BELOW_BUILD | {"build", "sample"},
    "distances": {"moments"},
    "features": {"data", "runtime", "trees"},
    "quality": BELOW_BUILD | {"build", "distances", "features", "sample", "summary"},
    "evaluate": BELOW_BUILD | {"build", "cells", "summary"},
    "train_dequantizer": BELOW_BUILD | {"build", "loop"},
    # Training draws the sample grids of its logs.
    "train": BELOW_BUILD | {"build", "loop", "sample"},
    "convert": BELOW_BUILD | {"build", "trees"},
    "main": {"architecture", "config", "runtime"},
}
PURE = (
    *("types", "sdes", "times", "divergence", "bits", "ode", "losses", "likelihood", "sampling"),
    *("oracle", "quadrature"),
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


def row(module: str) -> set[str]:
    """The row of the table for ``module``, by its longest prefix there."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (name := ".".join(parts[:n])) in ALLOWED:
            return ALLOWED[name]
    raise AssertionError(f"{module} has no row in the table of imports: place it in the layout")


@pytest.mark.parametrize("module", MODULES)
def test_the_table_of_imports(module: str) -> None:
    allowed = row(module) | VOCABULARY | {module.split(".")[0]}
    inside = {name.split(".")[1] for name in imports(tree_of(module)) if name.startswith("sbml.")}
    assert inside <= allowed, f"sbml.{module} must not import {sorted(inside - allowed)}"


@pytest.mark.parametrize("name", [name for name, row in ALLOWED.items() if not row >= BELOW_BUILD])
def test_the_table_allows_nothing_that_nobody_does(name: str) -> None:
    """Or it would not show the architecture. What stands on ``build`` has one row for all."""
    own = [m for m in MODULES if row(m) is ALLOWED[name]]
    used = {n.split(".")[1] for m in own for n in imports(tree_of(m)) if n.startswith("sbml.")}
    assert ALLOWED[name] <= used, f"{name}: {sorted(ALLOWED[name] - used)} is not imported"


@pytest.mark.parametrize("module", MODULES)
def test_the_package_stands_alone(module: str) -> None:
    outside = {name.split(".")[0] for name in imports(tree_of(module))}
    assert not outside & {"experiments", "tests", "benchmarks", "configs", "oracle", "conftest"}


@pytest.mark.parametrize("module", PURE)
def test_the_mathematics_knows_no_network_library(module: str) -> None:
    assert not NETWORK_LIBRARIES & {name.split(".")[0] for name in imports(tree_of(module))}


@pytest.mark.parametrize("module", MODULES)
def test_configs_are_read_above_the_building_blocks(module: str) -> None:
    if any(name.split(".")[0] == "ml_collections" for name in imports(tree_of(module))):
        readers = {"architecture", "trained", "config", "from_config", "build", "loop", "main"}
        assert module in readers | MODES


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


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"sdes"}))
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
    """As users of such libraries expect; and nothing of it is imported before it is asked for."""
    code = "import sys, sbml; assert 'jax' not in sys.modules; sbml.losses.dsm; sbml.samplers.ODE"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(hasattr(sbml, name) for name in sbml.LIBRARY)
    with pytest.raises(AttributeError, match="no attribute 'loses'; it has adapters, bits"):
        sbml.loses  # noqa: B018
