"""Two models a diffusion model must beat, fitted to the training integers in closed form.

    histogram   -log P(k) = sum_i -log (n_i[k_i] + 1) / (n + L)     per-pixel counts, add-one
    Gaussian    k + u ~ N(m, C), full covariance, u ~ U[0, 1)^d:
                E_u -log p = 1/2 [r^T C^-1 r + tr(C^-1) / 12 + log det(2 pi C)],  r = k + 1/2 - m

Both are exact per image: no noise enters.
"""

import math

import numpy as np

from sbml.bits import LOG2


def _flat(images: np.ndarray) -> np.ndarray:
    return np.reshape(images, (len(images), -1))


def histogram(train: np.ndarray, test: np.ndarray, levels: int) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under per-pixel histograms of ``train``."""
    train, test = _flat(train), _flat(test)
    total = np.zeros(len(test))
    for i in range(train.shape[1]):
        counts = np.bincount(train[:, i], minlength=levels) + 1.0
        total -= np.log2(counts / counts.sum())[test[:, i]]
    return total / train.shape[1]


def gaussian(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Bits/dim ``(m,)`` of uint8 ``test (m, *s)`` under a full-covariance Gaussian of ``train``.

    The covariance is that of the dequantized training data, so it has 1/12 on its diagonal beside
    the integers' and is never singular.
    """
    train, test = _flat(train).astype(np.float64), _flat(test).astype(np.float64)
    dims = train.shape[1]
    mean = train.mean(axis=0)
    covariance = np.atleast_2d(np.cov(train, rowvar=False)) + np.eye(dims) / 12
    factor = np.linalg.cholesky(covariance)
    whitened = np.linalg.solve(factor, (test - mean).T)
    inverse_trace = np.sum(np.linalg.solve(factor, np.eye(dims)) ** 2)
    log_det = 2 * np.sum(np.log(np.diag(factor))) + dims * math.log(2 * math.pi)
    nats = 0.5 * (np.sum(whitened**2, axis=0) + inverse_trace / 12 + log_det)
    return nats / (dims * LOG2)
