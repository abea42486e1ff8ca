"""Models a diffusion model must beat, fitted to the training integers in closed form.

    histogram   -log P(k) = sum_i -log (n_i[k_i] + 1) / (n + L)     per-pixel counts, add-one
    Gaussian    k + u ~ N(m, C), u ~ U[0, 1)^d:
                E_u -log p = 1/2 [r^T C^-1 r + tr(C^-1) / 12 + log det(2 pi C)],  r = k + 1/2 - m

C is the full covariance up to ``FULL`` dimensions, whose cost grows as their cube, and otherwise
the variances. Of no more images than dimensions the covariance is singular but for the 1/12 of the
dequantization: the number would say nothing of the data, and is left out. All are exact per image:
no noise enters.
"""

import math

import numpy as np
from scipy.linalg import solve_triangular

from sbml import moments
from sbml.bits import LOG2

FULL = 4096


def all_of(train: np.ndarray, test: np.ndarray, levels: int) -> dict[str, np.ndarray]:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under each that means something, by name."""
    found = {"per-pixel histogram": histogram(train, test, levels)}
    if omitted(train):
        return found
    if math.prod(train.shape[1:]) <= FULL:
        return {**found, "full-covariance Gaussian": gaussian(train, test)}
    return {**found, "diagonal Gaussian": diagonal_gaussian(train, test)}


def omitted(train: np.ndarray) -> dict[str, str]:
    """Why a baseline means nothing for ``train (n, *s)``, by name."""
    size = math.prod(train.shape[1:])
    if size > FULL or len(train) > size:
        return {}
    return {
        "full-covariance Gaussian": f"{len(train):,} training images are no more than their "
        f"{size:,} dimensions: their covariance is singular"
    }


def histogram(train: np.ndarray, test: np.ndarray, levels: int) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under per-pixel histograms of ``train``."""
    size = math.prod(train.shape[1:])
    offsets = levels * np.arange(size)
    counts = np.ones(size * levels)
    for part in moments.rows(train):
        counts += np.bincount((part.astype(np.int64) + offsets).ravel(), minlength=counts.size)
    log_p = np.log2(counts / (len(train) + levels))
    bits = [-log_p[part.astype(np.int64) + offsets].mean(axis=1) for part in moments.rows(test)]
    return np.concatenate(bits)


def gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under a full-covariance Gaussian of ``train``.

    The covariance is that of the dequantized training data, so it has 1/12 on its diagonal beside
    the integers' and is never singular.
    """
    mean = moments.mean(train)
    covariance = moments.covariance(train, mean)
    covariance[np.diag_indices_from(covariance)] += 1 / 12
    factor = np.linalg.cholesky(covariance)
    inverse_trace = np.sum(solve_triangular(factor, np.eye(mean.size), lower=True) ** 2)
    log_det = 2 * np.sum(np.log(np.diag(factor)))
    squares = [
        np.sum(solve_triangular(factor, (part - mean).T, lower=True) ** 2, axis=0)
        for part in moments.rows(test)
    ]
    return _bits(np.concatenate(squares), inverse_trace, log_det, mean.size)


def diagonal_gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """:func:`gaussian` of the variances alone."""
    mean = moments.mean(train)
    variances = moments.variances(train, mean) + 1 / 12
    squares = [np.sum((part - mean) ** 2 / variances, axis=1) for part in moments.rows(test)]
    log_det = np.sum(np.log(variances))
    return _bits(np.concatenate(squares), np.sum(1 / variances), log_det, mean.size)


def _bits(squares: np.ndarray, inverse_trace: float, log_det: float, dims: int) -> np.ndarray:
    nats = 0.5 * (squares + inverse_trace / 12 + log_det + dims * math.log(2 * math.pi))
    return nats / (dims * LOG2)
