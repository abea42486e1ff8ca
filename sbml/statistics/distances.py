"""Distances between two sets of images, by their features, and the inception score of one set.

With means m, covariances C of features, and the kernel k(x, y) = (x.y / d + 1)^3,

    Frechet    |m_1 - m_2|^2 + tr(C_1 + C_2 - 2 (C_1^(1/2) C_2 C_1^(1/2))^(1/2))  (Heusel 2017)
    kernel     mean k(x, x') + mean k(y, y') - 2 mean k(x, y), x != x', y != y'   (Binkowski 2018)
    inception  exp mean KL(p(c|x) || mean p(c|x))                                 (Salimans 2016)

The Frechet distance has an upward bias that decreases as 1 / n, so it can only be compared at the
same n; the kernel distance is unbiased. With the features of Inception-v3 the three are FID, KID
and IS. All are computed by NumPy in float64.
"""

import math
from typing import Annotated

import jax
import numpy as np
from jaxtyping import Float, Integer, Real

from sbml.core.door import typed
from sbml.core.scalars import Count, nonempty
from sbml.statistics import moments
from sbml.statistics.moments import Features, Moments

_Array = np.ndarray | jax.Array
Images = Real[_Array, "n *s"]


@typed
def frechet(one: Moments, other: Moments) -> float:
    """The squared Frechet distance of two Gaussians with these moments; at least 0."""
    parts = (one.mean, one.cov, other.mean, other.cov)
    if one.mean.shape != other.mean.shape:
        raise ValueError(
            f"moments of features of {one.mean.size} and of {other.mean.size} numbers: give the "
            "same features of both sets"
        )
    if not all(np.all(np.isfinite(part)) for part in parts):
        return math.nan  # eigh would raise an error that does not name the reason.
    values, vectors = np.linalg.eigh(one.cov)
    root = vectors * np.sqrt(np.maximum(values, 0))[None] @ vectors.T
    # This product has the eigenvalues of C_1 C_2, but it is symmetric.
    product = np.linalg.eigvalsh(root @ other.cov @ root)
    cross = np.sum(np.sqrt(np.maximum(product, 0)))
    shift = np.sum((one.mean - other.mean) ** 2)
    return float(max(0.0, shift + np.trace(one.cov) + np.trace(other.cov) - 2 * cross))


@typed
def kernel(x: Features, y: Real[_Array, "m d"], chunk: Count = 1000) -> float:
    """The unbiased squared maximum mean discrepancy of ``x (n, d)`` and ``y (m, d)``.

    Each sample needs two features or more. The estimate may be negative: for two samples of one
    distribution its expectation is 0. ``chunk`` rows of kernels are in memory at once.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"{len(x)} and {len(y)} features: the unbiased estimate needs two of each")

    def k(products: np.ndarray) -> np.ndarray:
        return (products / x.shape[1] + 1) ** 3

    def total(a: np.ndarray, b: np.ndarray) -> float:
        """The sum of k over all pairs, ``chunk`` rows at a time."""
        return sum(k(a[i : i + chunk] @ b.T).sum() for i in range(0, len(a), chunk))

    def off_diagonal(a: np.ndarray) -> float:
        return (total(a, a) - k(np.sum(a**2, axis=1)).sum()) / (len(a) * (len(a) - 1))

    return float(off_diagonal(x) + off_diagonal(y) - 2 * total(x, y) / (len(x) * len(y)))


@typed
def inception_score(probabilities: Real[_Array, "n classes"]) -> float:
    """Inception score: exp(mean_i KL(p_i || p)), between 1 and the number of classes.

    ``probabilities (n, classes)`` has the classifier's p_i(class) of image i in row i, and p is the
    mean of the rows.
    """
    p = np.asarray(probabilities, np.float64)
    if not len(p) or np.any(p < 0) or np.any(np.abs(p.sum(axis=1) - 1) > 1e-3):
        raise ValueError("probabilities must have rows, none negative, that each add up to 1")
    ratio = np.divide(p, p.mean(axis=0), out=np.ones_like(p), where=p > 0)  # 0 log 0 = 0
    return float(np.exp(np.mean(np.sum(p * np.log(ratio), axis=1))))


@typed
def nearest(
    x: Images, others: Annotated[Real[_Array, " m *s"], nonempty], chunk: Count = 1024
) -> tuple[Integer[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """The nearest of ``others (m, *s)`` to each of ``x (n, *s)``, by Euclidean distance.

    Only parts of the two sets are held in float64 at a time, so they may be large sets of integers.

    Returns:
      Indices ``(n,)`` into ``others``, and the distances ``(n,)`` divided by sqrt(d).
    """
    x, others = np.asarray(x), np.asarray(others)
    flat = np.reshape(x, (len(x), math.prod(x.shape[1:])))
    index, least = np.zeros(len(x), np.int64), np.full(len(x), np.inf)
    first = 0
    for part in moments.rows(others):
        norms = np.sum(part**2, axis=1)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            squares = norms - 2 * np.asarray(flat[rows], np.float64) @ part.T  # minus |x|^2
            best = squares.argmin(axis=1)
            value = squares[np.arange(len(best)), best]
            better = value < least[rows]
            index[rows] = np.where(better, first + best, index[rows])
            least[rows] = np.where(better, value, least[rows])
        first += len(part)
    pairs = zip(flat, others[index].reshape(flat.shape), strict=True)
    gaps = [np.asarray(a, np.float64) - b for a, b in pairs]
    return index, np.array([np.sqrt(np.mean(gap**2)) for gap in gaps])
