"""Compares every estimator with closed-form values in float64: ``--mode=verify``.

    error = |got - truth| / max(1, |truth|)

The true values use alpha, sigma, f and g of the SDE and nothing else of the package. In a row with
>= the error is the amount by which the inequality fails, divided in the same way. The tolerance of
a Monte Carlo row is five standard errors.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from sbml import compiler
from sbml.sdes import SDES
from sbml.verify.continuous import continuous_checks
from sbml.verify.integers import discrete_checks
from sbml.verify.row import Row


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


def table(rows: list[Row]) -> str:
    """The rows as aligned text, one line per row, with an empty line between SDEs."""
    width = max(len(row.name) for row in rows)
    line = f"{{:{width}}}  {{:9}}  {{:>16}}  {{:>16}}  {{:>8}}  {{:>9}}  {{}}"
    lines = [line.format("estimator", "SDE", "got", "truth", "error", "tolerance", "")]
    for before, row in zip((None, *rows), rows, strict=False):
        if before is None or before.sde != row.sde:
            lines.append("")
        numbers = f"{row.got:.10g}", f"{row.truth:.10g}", f"{row.error:.1e}", f"{row.tolerance:.1e}"
        lines.append(line.format(row.name, row.sde, *numbers, "" if row.ok else "FAILS"))
    return "\n".join(text.rstrip() for text in lines)
