"""Every estimator against data whose truth is closed form, in float64: ``--mode=verify``.

The truth uses alpha, sigma, f and g of the SDE and nothing else of the package. An error is
|got - truth| / max(1, |truth|); of a row with >= only what is missing to it. Rows by Monte Carlo
have five standard errors as their tolerance.
"""

import functools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from sbml import compiler
from sbml.checks.continuous import continuous_checks
from sbml.checks.integers import discrete_checks
from sbml.checks.row import Row
from sbml.runtime.versions import versions
from sbml.sdes import SDES


def _in_float64(rows: Callable[[], Iterable[Row]]) -> list[Row]:
    # On the CPU: TPUs have no float64, and what is held against the truth are the formulas.
    cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
    with cpu, jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        compiler.check()
        return list(rows())


def checks() -> list[Row]:
    """Every row, SDE by SDE, in float64 whatever the caller's setting."""
    jobs = [functools.partial(continuous_checks, name, kind()) for name, kind in SDES.items()]
    with ThreadPoolExecutor() as pool:  # Most of the time is compilation, which threads share.
        parts = pool.map(_in_float64, [discrete_checks, *jobs])
        discrete, *continuous = parts
    rows = [row for part in (*continuous, discrete) for row in part]
    return sorted(rows, key=lambda row: list(SDES).index(row.sde))


def table(rows: list[Row]) -> str:
    """Aligned text, a line a row and a block an SDE."""
    width = max(len(row.name) for row in rows)
    line = f"{{:{width}}}  {{:9}}  {{:>16}}  {{:>16}}  {{:>8}}  {{:>9}}  {{}}"
    lines = [line.format("estimator", "SDE", "got", "truth", "error", "tolerance", "")]
    for before, row in zip((None, *rows), rows, strict=False):
        if before is None or before.sde != row.sde:
            lines.append("")
        numbers = f"{row.got:.10g}", f"{row.truth:.10g}", f"{row.error:.1e}", f"{row.tolerance:.1e}"
        lines.append(line.format(row.name, row.sde, *numbers, "" if row.ok else "FAILS"))
    return "\n".join(text.rstrip() for text in lines)


def run(config: Any = None, workdir: Any = None) -> None:
    """Print the table; it depends on nothing of ``config`` and writes nothing to ``workdir``.

    Raises:
      SystemExit: with status 1, if a row fails.
    """
    start = time.perf_counter()
    print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    rows = checks()
    print(table(rows))
    failed = [row for row in rows if not row.ok]
    agree = f"{len(rows) - len(failed)} of {len(rows)} rows agree with the truth"
    print(f"\n{agree}, in {time.perf_counter() - start:.0f} s")
    if failed:
        print("failed: " + "; ".join(f"{row.name} ({row.sde})" for row in failed))
        raise SystemExit(1)
