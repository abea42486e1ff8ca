"""Compares every estimator with closed-form values in float64: ``--mode=verify``.

The true values use alpha, sigma, f and g of the SDE and nothing else of the package. The tolerance
of a Monte Carlo row is five standard errors.
"""

import functools
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from sbml import compiler
from sbml.runtime.versions import versions
from sbml.sdes import SDES
from sbml.verify.continuous import continuous_checks
from sbml.verify.integers import discrete_checks
from sbml.verify.table import Row, table


def on_cpu() -> Any:
    """A context in which computations run on the CPU: the comparison tests formulas, not the
    device, and TPUs have no float64."""
    return jax.default_device(jax.local_devices(backend="cpu")[0])


def _in_float64(rows: Callable[[], Iterable[Row]]) -> list[Row]:
    with on_cpu(), jax.enable_x64(True), jax.numpy_rank_promotion("raise"):
        compiler.check()
        return list(rows())


def checks(sdes: Sequence[str] = tuple(SDES)) -> list[Row]:
    """The rows of the named SDEs, in this order, computed in float64 whatever the caller's setting.

    Raises:
      KeyError: there is no SDE of such a name.
    """
    jobs = [functools.partial(continuous_checks, name, SDES[name]()) for name in sdes]
    with ThreadPoolExecutor() as pool:  # Most of the time is compilation, which runs in parallel.
        parts = pool.map(_in_float64, [functools.partial(discrete_checks, sdes), *jobs])
        discrete, *continuous = parts
    rows = [row for part in (*continuous, discrete) for row in part]
    return sorted(rows, key=lambda row: sdes.index(row.sde))


def run() -> None:
    """Print the table of comparisons.

    Raises:
      SystemExit: with status 1 if a row fails.
    """
    start = time.perf_counter()
    with on_cpu():
        print(f"jax {versions()['jax']}, XLA {versions()['xla']}\n")
    rows = checks()
    print(table(rows))
    failed = [row for row in rows if not row.ok]
    count = f"{len(rows) - len(failed)} of {len(rows)} rows agree with the truth"
    print(f"\n{count}, in {time.perf_counter() - start:.0f} s")
    if failed:
        print("failed: " + "; ".join(f"{row.name} ({row.sde})" for row in failed))
        raise SystemExit(1)
