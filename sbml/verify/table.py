"""The table of ``--mode=verify``: in each line an estimate, the truth, the error, its tolerance.

    error = |got - truth| / max(1, |truth|)

In a row with >= the error is the amount by which the inequality fails, divided in the same way.
"""

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

EPS = 1e-5

# Every function here runs once, so most of the time is compilation: compile without optimization.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Row(NamedTuple):
    """One comparison, in nats unless ``name`` says otherwise."""

    name: str
    sde: str
    got: float
    truth: float
    error: float
    tolerance: float
    ok: bool


def row(name: str, sde: str, got: Any, truth: Any, tolerance: float) -> Row:
    """The comparison of ``got`` with ``truth`` at the entry of the largest error; NaN counts as the
    largest error."""
    got, truth = np.broadcast_arrays(np.float64(got), np.float64(truth))
    error = (np.abs(got - truth) / np.maximum(1, np.abs(truth))).ravel()
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    g, t, e = (float(a.ravel()[worst]) for a in (got, truth, error))
    return Row(name, sde, g, t, e, tolerance, bool(e <= tolerance))


def bounding(name: str, sde: str, got: float, truth: float, looser: float, tolerance: float) -> Row:
    """The comparison truth <= got <= looser, where ``looser`` is a looser bound: the error is the
    distance of ``got`` from this interval, divided by max(1, |truth|)."""
    error = float(np.maximum(np.maximum(truth - got, got - looser), 0.0) / max(1.0, abs(truth)))
    return Row(name, sde, float(got), float(truth), error, tolerance, bool(error <= tolerance))


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
