"""One line of the table of ``--mode=verify``: an estimate and the truth, and how far they may be.

error = |got - truth| / max(1, |truth|)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sbml.sdes import SDE

EPS = 1e-5

# Everything here runs once: time goes to compiling, not to what is compiled.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


class Row(NamedTuple):
    """One comparison, in nats where ``name`` says nothing else."""

    name: str
    sde: str
    got: float
    truth: float
    error: float
    tolerance: float
    ok: bool


def row(name: str, sde: str, got: Any, truth: Any, tolerance: float) -> Row:
    """The worst of all entries; an error that is not a number is the worst there is."""
    got, truth = np.broadcast_arrays(np.float64(got), np.float64(truth))
    error = (np.abs(got - truth) / np.maximum(1, np.abs(truth))).ravel()
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    g, t, e = (float(a.ravel()[worst]) for a in (got, truth, error))
    return Row(name, sde, g, t, e, tolerance, bool(e <= tolerance))


def bounding(name: str, sde: str, got: float, truth: float, looser: float, tolerance: float) -> Row:
    """``got`` is to bound ``truth`` from above, no worse than the ``looser`` bound: the error is
    how far it lies outside."""
    error = float(np.maximum(np.maximum(truth - got, got - looser), 0.0) / max(1.0, abs(truth)))
    return Row(name, sde, float(got), float(truth), error, tolerance, bool(error <= tolerance))


def coefficients(sde: SDE, t: float) -> tuple[float, float]:
    """alpha and sigma."""
    time = jnp.asarray(t, float)
    return float(sde.mean_coef(time)), float(sde.std(time))
