"""Mean, variances and covariance of a data set that is too large to hold in float64.

    mean = sum_i x_i / n,      covariance = sum_i (x_i - mean) (x_i - mean)^T / (n - 1)

Each is one pass over the data, a part of the rows at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Real

from sbml.core.door import typed

Features = Real[np.ndarray | jax.Array, "n d"]

CHUNK = 2**23  # numbers in one part: 64 MiB of float64


def rows(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of ``x (n, *s)`` in order, as float64 parts ``(m, d)``.

    A part has at most ``CHUNK`` numbers, or one row if a row is longer.
    """
    size = int(np.prod(x.shape[1:]))
    if not size:
        raise ValueError(f"examples of shape {x.shape[1:]} have no numbers")
    step = max(1, CHUNK // size)
    for start in range(0, len(x), step):
        yield np.asarray(x[start : start + step], np.float64).reshape(-1, size)


def mean(
    x: np.ndarray,
    weights: np.ndarray | None = None,
    of: Callable[[np.ndarray], np.ndarray] = lambda part: part,
) -> np.ndarray:
    """The mean ``(d,)`` of ``of``, a function of rows ``(m, d)``, at ``x (n, *s)``; ``weights
    (n,)`` of the examples are equal if None."""
    weights = np.ones(len(x)) if weights is None else weights
    totals, start = [], 0
    for part in rows(x):
        totals.append((weights[start : start + len(part), None] * of(part)).sum(axis=0))
        start += len(part)
    return np.sum(totals, axis=0) / weights.sum()


def variances(x: np.ndarray, centre: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """The variances ``(d,)`` of the examples ``x (n, *s)`` around their mean ``centre (d,)``:
    sum_i w_i (x_i - centre)^2 / sum_i w_i with the ``weights`` w ``(n,)``, or with w_i = 1."""
    return mean(x, weights, lambda part: (part - centre) ** 2)


def covariance(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The covariance ``(d, d)`` of ``x (n, *s)`` around ``centre``, its mean; divisor n - 1."""
    if len(x) < 2:
        raise ValueError(f"{len(x)} examples: a covariance needs at least two")
    total = np.zeros((centre.size, centre.size))
    for part in rows(x):
        total += (part - centre).T @ (part - centre)
    return total / (len(x) - 1)


class Moments(NamedTuple):
    """Mean ``(d,)`` and covariance ``(d, d)`` (divided by n - 1) of ``size`` features."""

    mean: Float[np.ndarray, " d"]
    cov: Float[np.ndarray, " d d"]
    size: int

    @classmethod
    def of(cls, features: Features) -> "Moments":
        """The moments of ``features (n, d)``, two or more."""
        return cls.of_parts([features])

    @classmethod
    def of_parts(cls, parts: Iterable[Real[np.ndarray | jax.Array, "_ d"]]) -> "Moments":
        """The moments of features that come in parts ``(m, d)``, each of which is read once.

        The sums are of distances from the first part's mean, so that the covariance loses no digits
        by cancellation.
        """
        size = 0
        centre = total = products = np.zeros(())
        for part in parts:
            part = _table(part)
            if size and part.shape[1:] != centre.shape:
                raise ValueError(
                    f"features of {part.shape[1:]} after {centre.shape} numbers each: give parts "
                    "with the same number"
                )
            if not size:
                centre = part.mean(axis=0)
            for each in rows(part - centre):
                total, products = total + each.sum(axis=0), products + each.T @ each
            size += len(part)
        if size < 2:
            raise ValueError(f"{size} features: a covariance needs at least two")
        shift = total / size
        cov = (products - size * np.outer(shift, shift)) / (size - 1)
        return cls(centre + shift, cov, size)


@typed
def _table(features: Features) -> np.ndarray:
    return np.asarray(features, np.float64)
