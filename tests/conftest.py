"""What the tests share: float64 and strict ranks for the mathematics, and compiled functions."""

import gc
import os
import tempfile
from collections.abc import Iterator
from importlib.util import cache_from_source
from pathlib import Path

import pytest

# When XLA loads from the cache below, it logs a long list of the processor's features as an error.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# A matrix of a few hundred rows is decomposed ten times faster by one thread than by two that wait
# for each other on processors that are busy with other tests. NumPy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from sbml.core import compiler

# Most of the suite's time is compilation of small functions. So they are compiled with less
# optimization, and by XLA's older way of emitting fusions, which takes half as long at that level.
# Each worker compiles in one thread, because the other cores run tests of their own. Newer versions
# of XLA do not have all of these flags.
os.environ["XLA_FLAGS"] = compiler.with_flags(
    os.environ.get("XLA_FLAGS", ""),
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)

# Many functions are needed again in another file, and some in other processes. Their compiled code
# is kept in a folder that is deleted when the first test process ends. Its workers, and the
# programs that tests start, find the name of the folder in the environment. If Python's bytecode
# may not be written beside the sources, and the installation wrote none either, it is kept in this
# folder too: without bytecode, each process would take five seconds to compile what it imports.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="sbml-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_compiled.name}/xla"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    _installed = Path(cache_from_source(pytest.__file__)).exists()
    if not _installed and os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
        os.environ["PYTHONPYCACHEPREFIX"] = f"{_compiled.name}/python"

import jax
import jaxtyping
import shapes
from filelock import FileLock

jaxtyping.install_import_hook(shapes.CHECKED, "shapes.check")

# Tracing makes millions of objects that are kept. So garbage is collected less often.
gc.set_threshold(100_000, 50, 50)


ALL = "not notebook and not frameworks"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how the other tests are run, if this run left them out."""
    if terminalreporter.config.option.markexpr == f"not slow and {ALL}":
        terminalreporter.write_line(f'These were the quick tests. All tests: pytest -m "{ALL}"')


@pytest.fixture(scope="session", autouse=True)
def steps_compile_fast() -> Iterator[None]:
    """Compile training steps without ``platform.compiler_options``: a test runs only a dozen steps.

    Programs that the tests start in processes of their own use these options.
    """
    from sbml.program.runtime import sharding

    options = sharding.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "compiler_options", lambda *level: options(*level) if level else {})
        yield


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_are_dropped() -> Iterator[None]:
    """Drop them after each file: those of the whole suite would take 9 GB in each process."""
    yield
    jax.clear_caches()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions as users call them, without the checks of ``shapes``."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def digits_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work directory of a training with ``tests/tiny.py``, which all workers share. Tests only
    read it; those that write make a link to its folder ``checkpoints`` in one of their own."""
    import runs
    import tiny

    from sbml.program.modes import train

    base = tmp_path_factory.getbasetemp()
    workdir = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits_model"
    with FileLock(f"{workdir}.lock"):
        if not workdir.exists():
            runs.mode(train.run, tiny.get_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def small_designs() -> Iterator[None]:
    """Add the designs "small cifar10" and "small imagenet32" of Flow++, with two couplings, because
    the published designs are slow to compile."""
    from sbml.dequantizers.variational import DESIGNS

    with pytest.MonkeyPatch.context() as patch:
        for name, design in list(DESIGNS.items()):
            fewer = design._replace(couplings=2, context_blocks=2)
            patch.setitem(DESIGNS, f"small {name}", fewer)
        yield


@pytest.fixture(scope="module")
def x64() -> Iterator[None]:
    """float64, and an error wherever a rank would be broadcast, for a whole test module.

    A module asks for it once: ``pytestmark = pytest.mark.usefixtures("x64")``. The other modules
    run in float32, as the networks do.
    """
    with jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        yield
