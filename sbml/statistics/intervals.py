"""Error bars of a mean.

For n values b_i with sample standard deviation S,

    mean +- t_{n-1, 0.975} S / sqrt(n)

is the 95% confidence interval of the expectation. If each value belongs to an image, it covers all
noise: that of the choice of images and that of every random draw that is part of the values.
Non-finite values are never trimmed: they make the mean non-finite, and their count is reported.

For *this* data set only the random draws are noise. R independent sweeps over all its images have
means m_r, and mean +- t_{R-1, 0.975} sd(m_r) / sqrt(R) covers that noise. If the draws of different
images are independent, a second draw for m of the images is enough: with the differences D_i of the
two draws, the noise of the mean over n images has variance mean(D_i^2) / (2 n). If all images were
equally noisy, that estimate would have m degrees of freedom. In general it has about
(sum of variances)^2 / (sum of their squares) (Satterthwaite, Biometrics Bulletin 1946), and its
estimate from the D_i is

    3 (sum D_i^2)^2 / sum D_i^4 - 2,      limited to [1, m].

None of these intervals can be trusted if a few rare draws decide the mean: if such draws are
missing, both the mean and its error bar are too small. :func:`pareto_k` estimates how heavy the
tail of the draws is. With k = 1/2 their variance becomes infinite, and with k = 1 their mean. What
the draws never show, such as a rare region that none of them has met, no such number can show.
"""

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import jax
import numpy as np
import scipy
from jaxtyping import Integer, Real

from sbml.core.door import typed
from sbml.core.scalars import Count, at_least

Values = Real[np.ndarray | jax.Array, "_"] | Sequence[float]
NotNegative = Annotated[float, at_least(0)]  # or NaN

HEAVY = 0.7  # the largest :func:`pareto_k` of draws whose mean has a reliable error bar
LEAST_TAIL = 7  # the smallest number of draws to which a tail is fitted
# One of 8 or more draws decides their standard error if it has this share of the sum of squares.
MOST, LEAST_DRAWS = 0.9, 8


class Interval(NamedTuple):
    """A mean with its 95% confidence interval, in the unit of the values.

    Attributes:
      mean: the mean of the values.
      stderr: its standard error.
      ci95: the half-width of its 95% confidence interval.
      n: the number of values.
      nonfinite: the number of values that are not finite.
    """

    mean: float
    stderr: float
    ci95: float
    n: int
    nonfinite: int

    @property
    def bounds(self) -> tuple[float, float]:
        """The lower and the upper end of the interval."""
        return self.mean - self.ci95, self.mean + self.ci95


def cell(value: Interval | float, sign: str = "+-") -> str:
    """A number as text, with half of its interval if it has one."""
    if not isinstance(value, Interval):
        return f"{value:z.4g}"
    return f"{value.mean:z.4g} {sign}{value.ci95:.2g}"


@typed
def mean_interval(values: Values, skewed: bool = False) -> Interval:
    """The interval of the mean of ``values (n,)``; its half-width is infinite for one value.

    For ``skewed`` values, such as squares, the longer side of Hall's interval (JRSS B 1992) has

        3 (1 - (1 - a t - a^2 / 6)^(1/3)) / a    for Student's t,    a = |skewness| / sqrt(n)
    """
    values = np.asarray(values, np.float64)
    n = len(values)
    if not n:
        raise ValueError(f"values of shape {values.shape}: a mean needs at least one value")
    stderr = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    nonfinite, mean = int(np.sum(~np.isfinite(values))), float(np.mean(values))
    half = half_width(stderr, n - 1)
    if skewed and 0 < half < math.inf:
        a = max(abs(float(np.mean(((values - mean) / stderr) ** 3))) / n**2, 1e-6)
        half = float(3 * (1 - np.cbrt(1 - a * half / stderr - a**2 / 6)) / a) * stderr
    return Interval(mean, stderr, half, n, nonfinite)


def difference(one: Interval, other: Interval) -> Interval:
    """The mean of ``one`` minus that of ``other``, of independent values, with Welch's interval:

        stderr^2 = s_1^2 + s_2^2,   freedom = stderr^4 / (s_1^4 / (n_1 - 1) + s_2^4 / (n_2 - 1))

    where s_i are the two standard errors (Welch, Biometrika 1947).
    """
    a, b, freedom = one.stderr**2, other.stderr**2, 0.0
    if min(one.n, other.n) > 1:
        parts = a**2 / (one.n - 1) + b**2 / (other.n - 1)
        freedom = (a + b) ** 2 / parts if parts else 1.0  # Without any spread the width is 0.
    stderr, lost = math.sqrt(a + b), one.nonfinite + other.nonfinite
    ci95 = half_width(stderr, freedom)
    return Interval(one.mean - other.mean, stderr, ci95, one.n + other.n, lost)


@typed
def half_width(stderr: NotNegative, freedom: NotNegative) -> float:
    """Student's 97.5% quantile times ``stderr``; infinite if ``freedom`` is 0."""
    return float(scipy.special.stdtrit(freedom, 0.975)) * stderr if freedom > 0 else math.inf


@typed
def repeated_stderr(first: Values, second: Values, n: Count) -> tuple[float, float]:
    """The noise of the mean over ``n`` images, from two independent draws ``(m,)`` for m of them.

    Returns:
      The standard error in the unit of the draws, and its degrees of freedom in [1, m]; infinity
      and 0 if m = 0.
    """
    one, other = (np.asarray(v, np.float64) for v in (first, second))
    if len(one) != len(other):
        raise ValueError(f"{len(one)} and {len(other)} draws: give two draws of each image")
    squares = (one - other) ** 2
    m = len(squares)
    if not m:
        return math.inf, 0.0
    scale = float(np.max(squares))
    freedom = float(m)
    if 0 < scale < math.inf:
        shares = squares / scale  # the squares of these neither overflow nor vanish
        freedom = 3 * float(np.sum(shares)) ** 2 / float(np.sum(shares**2)) - 2
    return math.sqrt(float(np.mean(squares)) / (2 * n)), min(max(freedom, 1.0), m)


@typed
def pareto_k(deviations: Real[np.ndarray | jax.Array, "..."]) -> float:
    """The shape k of a generalised Pareto distribution, fitted to the largest magnitudes.

    A tail with this shape has moments of an order below 1/k only; k is about 0 for a normal or an
    exponential distribution. The fit is to the min(n / 5, 3 sqrt(n)) largest of n magnitudes. It is
    the posterior mean of Zhang & Stephens (Technometrics 2009), and is then moved towards 1/2 as by
    ten more observations, as in Pareto-smoothed importance sampling (Vehtari et al., JMLR 2024).

    Args:
      deviations: draws, each minus the centre of its distribution, of any shape.

    Returns:
      k; infinity if one of at least ``LEAST_DRAWS`` magnitudes has more than ``MOST`` of the sum of
      squares; nan if the tail has fewer than ``LEAST_TAIL`` magnitudes, if a quarter of them exceed
      the largest one below the tail by at most 1e-4 of it, or if a value is not finite.
    """
    magnitudes = np.sort(np.abs(np.asarray(deviations, np.float64)), axis=None)
    count = tail_size(magnitudes.size)
    if not np.all(np.isfinite(magnitudes)):
        return math.nan
    if magnitudes.size >= LEAST_DRAWS and (largest := magnitudes[-1]) > 0:
        shares = (magnitudes / largest) ** 2  # of the largest square, so nothing overflows
        if MOST * np.sum(shares) < 1:
            return math.inf
    if count < LEAST_TAIL:
        return math.nan
    tail = magnitudes[-count:] - magnitudes[-count - 1]
    if not _quartile(tail) > 1e-4 * magnitudes[-count - 1]:
        return math.nan
    return generalised_pareto(tail)[0]


def tail_size(n: int) -> int:
    """The number of the largest of ``n`` draws to which a tail is fitted."""
    return math.ceil(min(n / 5, 3 * math.sqrt(n)))


def _quartile(tail: np.ndarray) -> float:
    return float(tail[int(len(tail) / 4 + 0.5) - 1])


def generalised_pareto(tail: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution, fitted to sorted excesses ``tail (m,)``
    as in :func:`pareto_k`. Its quantiles are scale ((1 - p)^-k - 1) / k."""
    count = len(tail)
    grid = np.arange(1, 31 + int(math.sqrt(count))) - 0.5
    theta = 1 / tail[-1] + (1 - np.sqrt(len(grid) / grid)) / (3 * _quartile(tail))

    def shape(theta: np.ndarray) -> np.ndarray:
        return np.mean(np.log1p(-theta[:, None] * tail), axis=1)

    each = shape(theta)
    weights = scipy.special.softmax(count * (np.log(-theta / each) - each - 1))
    best = np.atleast_1d(weights @ theta)
    k = float(shape(best)[0])
    return (count * k + 10 * 0.5) / (count + 10), -k / float(best[0])


def about_tail(k: float, draws: str) -> str:
    """What a :func:`pareto_k` above ``HEAVY`` says of the ``draws``."""
    if k == math.inf:
        return f"one of the {draws} has more than {MOST:.0%} of the sum of their squares"
    return f"Pareto's k of the {draws} is {k:.2f}, above {HEAVY:g}"


@typed
def outliers(values: Values) -> Integer[np.ndarray, " m"]:
    """Indices of values further than 6 robust standard deviations from the median.

    The robust standard deviation is 1.4826 times the median absolute deviation. It and the median
    are those of the finite values; values that are not finite are outliers. Outliers stay in the
    mean: they are listed so that the reader knows which values dominate it.
    """
    values = np.asarray(values, np.float64)
    finite = np.isfinite(values)
    if not finite.any():
        return np.arange(len(values))
    distance = np.abs(values - np.median(values[finite]))
    near = distance <= 6 * 1.4826 * np.median(distance[finite])
    return np.flatnonzero(~(finite & near))
