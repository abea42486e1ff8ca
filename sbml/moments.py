"""Mean, variances and covariance of a data set that is too large to hold in float64.

    mean = sum_i x_i / n,      covariance = sum_i (x_i - mean) (x_i - mean)^T / (n - 1)

Each is one pass over the data, a part of the rows at a time.
"""

from collections.abc import Iterator

import numpy as np

CHUNK = 2**23  # numbers in one part: 64 MiB of float64


def rows(x: np.ndarray) -> Iterator[np.ndarray]:
    """The rows of ``x (n, *s)`` in order, as float64 parts ``(m, d)``.

    A part has at most ``CHUNK`` numbers, or one row if a row is longer.

    Raises:
      ValueError: a row has no numbers.
    """
    size = int(np.prod(x.shape[1:]))
    if not size:
        raise ValueError(f"examples of shape {x.shape[1:]} have no numbers")
    step = max(1, CHUNK // size)
    for start in range(0, len(x), step):
        yield np.asarray(x[start : start + step], np.float64).reshape(-1, size)


def mean(x: np.ndarray) -> np.ndarray:
    """The mean ``(d,)`` of ``x (n, *s)``."""
    return np.sum([part.sum(axis=0) for part in rows(x)], axis=0) / len(x)


def variances(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The variances ``(d,)`` of ``x (n, *s)`` with mean ``centre (d,)``; the divisor is n."""
    return np.sum([((part - centre) ** 2).sum(axis=0) for part in rows(x)], axis=0) / len(x)


def covariance(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The covariance ``(d, d)`` of ``x (n, *s)`` with mean ``centre (d,)``; the divisor is n - 1.

    Raises:
      ValueError: for fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"{len(x)} examples: a covariance needs at least two")
    total = np.zeros((centre.size, centre.size))
    for part in rows(x):
        total += (part - centre).T @ (part - centre)
    return total / (len(x) - 1)
