"""Baselines: simple models of the training integers, fitted in closed form.

    histogram   -log P(k) = sum_i -log (n_i[k_i] + 1) / (n + L)
    Gaussian    k + u ~ N(m, C), u ~ U[0, 1)^d:
                E_u -log p = 1/2 [r^T C^-1 r + tr(C^-1) / 12 + log det(2 pi C)],  r = k + 1/2 - m

Here n_i[k] is the number of the n training images whose pixel i has the value k. C is the full
covariance up to ``FULL`` dimensions, because its cost grows as their cube, and otherwise diagonal.
If there are no more images than dimensions, the covariance of the integers is singular, and only
the 1/12 of the dequantization makes C regular. The full covariance then says little about the data,
so this baseline is omitted. All numbers are exact for each image, without random draws.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.linalg import solve_triangular

from sbml.core.bits import LOG2
from sbml.statistics import moments

FULL = 4096  # the largest number of dimensions for a full covariance


def all_of(
    train: np.ndarray, test: np.ndarray, levels: int
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under each baseline, by name; and the reasons, by
    name, why others are omitted for ``train (n, *s)``."""
    size = math.prod(train.shape[1:])
    values = {"per-pixel histogram": histogram(train, test, levels)}
    if size > FULL:
        return {**values, "diagonal Gaussian": diagonal_gaussian(train, test)}, {}
    if len(train) > size:
        return {**values, "full-covariance Gaussian": gaussian(train, test)}, {}
    reason = (
        f"{len(train):,} training images are no more than their {size:,} dimensions: their "
        "covariance is singular"
    )
    return values, {"full-covariance Gaussian": reason}


def histogram(train: np.ndarray, test: np.ndarray, levels: int) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under the histograms of the pixels of ``train``.

    Every count is larger by one than in the data, so no probability is 0.
    """
    size = math.prod(train.shape[1:])
    offsets = levels * np.arange(size)
    counts = np.ones(size * levels)
    for part in moments.rows(train):
        counts += np.bincount((part.astype(np.int64) + offsets).ravel(), minlength=counts.size)
    log_p = np.log2(counts / (len(train) + levels))
    return _each(test, lambda part: -log_p[part.astype(np.int64) + offsets].mean(axis=1))


def gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under a full-covariance Gaussian of ``train``.

    The covariance is that of the dequantized training data: 1/12 is added to the diagonal of the
    integers' covariance, so it is never singular.
    """
    mean = moments.mean(train)
    covariance = moments.covariance(train, mean)
    covariance[np.diag_indices_from(covariance)] += 1 / 12
    factor = np.linalg.cholesky(covariance)
    inverse_trace = np.sum(solve_triangular(factor, np.eye(mean.size), lower=True) ** 2)
    log_det = 2 * np.sum(np.log(np.diag(factor)))

    def squares(part: np.ndarray) -> np.ndarray:
        return np.sum(solve_triangular(factor, (part - mean).T, lower=True) ** 2, axis=0)

    return _bits(_each(test, squares), inverse_trace, log_det, mean.size)


def diagonal_gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """As :func:`gaussian`, with the variances only: all covariances are set to 0."""
    mean = moments.mean(train)
    variances = moments.variances(train, mean) + 1 / 12
    squares = _each(test, lambda part: np.sum((part - mean) ** 2 / variances, axis=1))
    log_det = np.sum(np.log(variances))
    return _bits(squares, np.sum(1 / variances), log_det, mean.size)


def _each(test: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """``of`` of the rows of ``test``, a part at a time: ``(m,)``."""
    return np.concatenate([of(part) for part in moments.rows(test)])


def _bits(squares: np.ndarray, inverse_trace: float, log_det: float, dims: int) -> np.ndarray:
    """Bits/dim from r^T C^-1 r of each image, tr(C^-1) and log det C."""
    nats = 0.5 * (squares + inverse_trace / 12 + log_det + dims * math.log(2 * math.pi))
    return nats / (dims * LOG2)
