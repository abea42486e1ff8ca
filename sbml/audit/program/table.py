"""A row of ``--mode=verify``: an estimate, the truth, the error, and its tolerance.

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
