"""A row of ``--mode=verify``: an estimate, the truth, the error, and its tolerance.

error = |got - truth| / max(1, |truth|)
"""

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike

EPS = 1e-5


class Row(NamedTuple):
    """One comparison, in nats unless ``name`` says otherwise."""

    name: str
    sde: str
    got: float
    truth: float
    error: float
    tolerance: float
    ok: bool


def row(name: str, sde: str, got: ArrayLike, truth: ArrayLike, tolerance: float) -> Row:
    """The comparison of ``got`` with ``truth`` at the entry of the largest error; NaN counts as the
    largest error."""
    got, truth = np.broadcast_arrays(np.asarray(got, float), np.asarray(truth, float))
    error = (np.abs(got - truth) / np.maximum(1, np.abs(truth))).ravel()
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    g, t, e = (float(a.ravel()[worst]) for a in (got, truth, error))
    return Row(name, sde, g, t, e, tolerance, bool(e <= tolerance))
