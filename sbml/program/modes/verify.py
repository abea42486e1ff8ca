"""Compares every way to a number with worlds whose P(k) or log p is known: ``--mode=verify``.

``audit.suite`` checks our estimators for integers, and ``audit.mistakes`` must fail the checks that
they name and no other. The rows of ``audit.ways`` compare what is computed of continuous data, of a
table and of a coded file with the truth, and error bars with the errors that they describe. The
tolerance of a Monte Carlo row is five standard errors. All are computed on a CPU: formulas are
tested, not the device.
"""

import contextlib
import itertools
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from sbml.audit.mistakes import MISTAKES
from sbml.audit.ours import OURS
from sbml.audit.suite import FAIL, WORLDS, Estimator, Report, audit
from sbml.audit.table import Row
from sbml.codec import bits_back
from sbml.core import compiler
from sbml.core.progress import over
from sbml.core.types import T
from sbml.program.runtime.versions import versions
from sbml.program.verify import ways
from sbml.sdes import SDES

# As many as tell our estimators from the mistakes in a short time.
HOW = {"calls": 32, "repetitions": 200}


def on_cpu() -> Any:
    """A context in which computations run on the CPU; TPUs have no float64."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def in_float64(rows: Callable[[str], Iterable[Row]], name: str) -> list[Row]:
    """The rows in float64, whatever the caller's setting; an error is a row that fails."""
    found: list[Row] = []
    with on_cpu(), jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        try:
            compiler.check()
            found += rows(name)
        except Exception:
            traceback.print_exc()
            found.append(Row(rows.__name__, name, math.nan, math.nan, math.nan, math.nan, False))
    return found


def audited(estimator: Estimator, options: Mapping[str, Any]) -> Report:
    """The report about an estimator."""
    with on_cpu():
        return audit(estimator, **{**HOW, **options})


def results() -> tuple[list[Report], list[Report], list[Row]]:
    """Reports about the package's estimators, reports about planted mistakes, and the rows."""
    first = dict(itertools.islice(WORLDS.items(), 1))
    jobs: list[Callable[[], Any]] = [partial(audited, *each) for each in OURS.items()]
    jobs += [partial(audited, each, {"worlds": first}) for each in MISTAKES]
    audits = in_parallel("audits", jobs)
    jobs = [partial(in_float64, ways.sde_rows, name) for name in SDES]
    jobs += [partial(in_float64, rows, "vp") for rows in ways.ONCE]
    with fast_compilation():
        rows = in_parallel("rows", jobs)
    return audits[: len(OURS)], audits[len(OURS) :], [*itertools.chain(*rows)]


def in_parallel(name: str, jobs: Sequence[Callable[[], T]]) -> list[T]:
    """The results of the jobs; most of their time is compilation, which runs in parallel."""
    with ThreadPoolExecutor() as pool:
        tasks = [pool.submit(job) for job in jobs]
        return [task.result() for task in over(tasks, f"verify, {name}", "part", len(tasks))]


@contextlib.contextmanager
def fast_compilation() -> Iterator[None]:
    """A context in which XLA hardly optimizes. The programs of the rows run once or twice, and are
    compiled in half of the time; those of the audits run hundreds of times."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def row(report: Report, result: str) -> str:
    """A line of the first table: the name, the excess in each world, and the result."""
    excess = [f"{report.excess[w]:+z.4f}" if w in report.excess else "" for w in WORLDS]
    return "  ".join([f"{report.estimator:40}", *(f"{each:>9}" for each in excess), result])


def reason(report: Report) -> str:
    """The checks that failed, each with the value of its first failure."""
    failures = {f.check: f.value for f in reversed(report.findings) if f.verdict == FAIL}
    each = [f"{name} ({value:.3g})" for name, value in reversed(failures.items())]
    return f"caught by {', '.join(each)}"


def table(rows: Iterable[Row]) -> str:
    """The rows, with an empty line between SDEs."""
    rows = [*rows]
    width = max(len(row.name) for row in rows)
    line = f"{{:{width}}}  {{:14}}  {{:>13}}  {{:>13}}  {{:>8}}  {{:>9}}  {{}}"
    lines = [line.format("number", "SDE", "got", "truth", "error", "tolerance", "")]
    for _, of in itertools.groupby(rows, lambda row: row.sde):
        lines.append("")
        for name, sde, got, truth, error, tolerance, ok in of:
            found = f"{got:.7g}", f"{truth:.7g}", f"{error:.1e}", f"{tolerance:.1e}"
            lines.append(line.format(name, sde, *found, "" if ok else "FAILS"))
    return "\n".join(text.rstrip() for text in lines)


def run() -> None:
    """Print what was found.

    Raises:
      SystemExit: with status 1 if one of ours does not pass, a mistake is not caught, or a row
        fails.
    """
    start = time.perf_counter()
    with on_cpu():
        print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    right, wrong, rows = results()
    print("  ".join([f"{'excess in bits/dim':40}", *(f"{name:>9}" for name in WORLDS)]) + "\n")
    bad = []
    for r in right:
        bad += [] if r.passed else [r]
        print(row(r, "pass" if r.passed else "FAILS"))
    print()
    for r, fails in zip(wrong, MISTAKES.values(), strict=True):
        caught = r.failed == fails
        bad += [] if caught else [r]
        print(row(r, reason(r) if caught else "NOT CAUGHT"))
    print(f"\n{table(rows)}")
    if not bits_back.installed():
        print("no coded image was compared: pip install 'sbml[codec]'")
    for r in bad:
        print(f"\n{r}")
    failed = [r.estimator for r in bad] + [f"{r.name} ({r.sde})" for r in rows if not r.ok]
    total = len(right) + len(wrong) + len(rows)
    count = f"{total - len(failed)} of {total} rows agree with the truth"
    print(f"\n{count}, in {time.perf_counter() - start:.0f} s")
    if failed:
        print("failed: " + "; ".join(failed))
        sys.exit(1)
