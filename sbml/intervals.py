"""Error bars of a mean.

For n values b_i with sample standard deviation S,

    mean +- t_{n-1, 0.975} S / sqrt(n)

is the 95% confidence interval of the expectation: over images it holds all noise, of the images and
of every random draw that went into their values. Non-finite values are never trimmed: they make
the mean non-finite, and their count is reported.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean, its standard error, and the half-width of its 95% confidence interval."""

    mean: float
    stderr: float
    ci95: float
    n: int
    nonfinite: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The two ends of the interval."""
        return self.mean - self.ci95, self.mean + self.ci95


def mean_interval(values: np.ndarray) -> Interval:
    """The interval of the mean of ``values (n,)``; infinite half-width for fewer than two.

    Raises:
      ValueError: for no values at all.
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if not n:
        raise ValueError("no values to average")
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    quantile = float(stats.t.ppf(0.975, n - 1)) if n > 1 else 1.0
    nonfinite = int(np.sum(~np.isfinite(values)))
    return Interval(float(np.mean(values)), stderr, quantile * stderr, n, nonfinite)
