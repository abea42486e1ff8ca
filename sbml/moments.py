"""Mean and covariance of a set too large to hold in float64: two passes, some rows at a time."""

from collections.abc import Iterator

import numpy as np

CHUNK = 2**23  # numbers at a time: 64 MiB of float64


def rows(x: np.ndarray) -> Iterator[np.ndarray]:
    """``x (n, *s)`` as float64 ``(m, d)``, in order, at most ``CHUNK`` numbers or one row each."""
    size = int(np.prod(x.shape[1:]))
    step = max(1, CHUNK // size)
    for start in range(0, len(x), step):
        yield np.asarray(x[start : start + step], np.float64).reshape(-1, size)


def mean(x: np.ndarray) -> np.ndarray:
    """``(d,)`` of ``x (n, *s)``."""
    return np.sum([part.sum(axis=0) for part in rows(x)], axis=0) / len(x)


def variances(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """``(d,)``, of ``x (n, *s)`` around its mean ``centre (d,)``, divided by n."""
    return np.sum([((part - centre) ** 2).sum(axis=0) for part in rows(x)], axis=0) / len(x)


def covariance(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """``(d, d)``, of ``x (n, *s)`` around its mean ``centre (d,)``, divided by n - 1.

    Raises:
      ValueError: for fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"no covariance of {len(x)} images: need at least two to train on")
    total = np.zeros((centre.size, centre.size))
    for part in rows(x):
        total += (part - centre).T @ (part - centre)
    return total / (len(x) - 1)
