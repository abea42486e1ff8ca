"""The audit of the program's formulas: ``--mode=verify`` compares every estimator with closed-form
values in float64.

Some rows call the functions that an evaluation calls; the others check parts of these functions.

The true values use alpha, sigma, f and g of the SDE and nothing else of the package. The tolerance
of a Monte Carlo row is five standard errors.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from sbml import compiler
from sbml.audit.program.codec import codec_rows
from sbml.audit.program.continuous import continuous_checks
from sbml.audit.program.draws import shared_rows
from sbml.audit.program.evaluation import evaluation_rows
from sbml.audit.program.integers import discrete_checks
from sbml.audit.program.table import Row
from sbml.codec import stack
from sbml.progress import over
from sbml.runtime.versions import versions
from sbml.sdes import SDES


def on_cpu() -> Any:
    """A context in which computations run on the CPU: the comparison tests formulas, not the
    device, and TPUs have no float64."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def checks(sdes: Sequence[str] = tuple(SDES)) -> list[Row]:
    """The rows of the named SDEs, in this order, in float64 whatever the caller's setting."""

    def in_float64(rows: Callable[[], Iterable[Row]]) -> list[Row]:
        with on_cpu(), jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
            compiler.check()
            return list(rows())

    jobs: list[Callable[[], Iterable[Row]]] = [functools.partial(discrete_checks, sdes)]
    jobs += [functools.partial(continuous_checks, name, SDES[name]()) for name in sdes]
    for of_one in (codec_rows, shared_rows, evaluation_rows):  # One SDE is enough.
        jobs.append(functools.partial(of_one, sdes[0], SDES[sdes[0]]()))
    with ThreadPoolExecutor() as pool:  # Most of the time is compilation, which runs in parallel.
        parts = over(pool.map(in_float64, jobs), "verify", "part", len(jobs))
        discrete, *continuous = parts
    rows = [row for part in (*continuous, discrete) for row in part]
    return sorted(rows, key=lambda row: sdes.index(row.sde))


def run() -> None:
    """Print the table of comparisons, with an empty line between SDEs.

    Raises:
      SystemExit: with status 1 if a row fails.
    """
    start = time.perf_counter()
    with on_cpu():
        print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    rows = checks()
    width = max(len(row.name) for row in rows)
    line = f"{{:{width}}}  {{:9}}  {{:>16}}  {{:>16}}  {{:>8}}  {{:>9}}  {{}}"
    lines = [line.format("estimator", "SDE", "got", "truth", "error", "tolerance", "")]
    for _, of_sde in itertools.groupby(rows, lambda row: row.sde):
        lines.append("")
        for row in of_sde:
            found = f"{row.got:.10g}", f"{row.truth:.10g}", f"{row.error:.1e}"
            mark = "" if row.ok else "FAILS"
            lines.append(line.format(row.name, row.sde, *found, f"{row.tolerance:.1e}", mark))
    print("\n".join(text.rstrip() for text in lines))
    failed = [row for row in rows if not row.ok]
    count = f"{len(rows) - len(failed)} of {len(rows)} rows agree with the truth"
    print(f"\n{count}, in {time.perf_counter() - start:.0f} s")
    if not stack.installed():
        print("no coded image was compared: pip install 'sbml[codec]'")
    if failed:
        print("failed: " + "; ".join(f"{row.name} ({row.sde})" for row in failed))
        raise SystemExit(1)
