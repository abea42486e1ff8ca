"""The distances compared with SciPy, closed forms and direct sums."""

import numpy as np
import pytest
from scipy import linalg
from scipy.spatial import distance
from scipy.stats import entropy

from sbml.statistics import distances, moments
from sbml.statistics.distances import Moments

RNG = np.random.default_rng(0)


def features(n: int, d: int = 5, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return shift + rng.normal(size=(n, d)) @ rng.normal(size=(d, d))


def test_frechet_agrees_with_scipys_matrix_root() -> None:
    one, other = Moments.of(features(200)), Moments.of(features(300, shift=0.5, seed=1))
    root = linalg.sqrtm(one.cov @ other.cov).real
    expected = np.sum((one.mean - other.mean) ** 2) + np.trace(one.cov + other.cov - 2 * root)
    np.testing.assert_allclose(distances.frechet(one, other), expected, rtol=1e-9)
    np.testing.assert_allclose(distances.frechet(other, one), expected, rtol=1e-9)


def test_frechet_of_diagonal_covariances_is_a_distance_of_standard_deviations() -> None:
    a, b, m = np.array([1.0, 4.0]), np.array([9.0, 0.25]), np.array([0.5, -1.0])
    value = distances.frechet(Moments(0 * m, np.diag(a), 9), Moments(m, np.diag(b), 9))
    np.testing.assert_allclose(value, np.sum(m**2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2))


def test_frechet_of_rank_deficient_features() -> None:
    """With fewer features than dimensions, a matrix root of the product fails or is complex."""
    one = Moments.of(features(4, 16))
    np.testing.assert_allclose(distances.frechet(one, one), 0, atol=1e-6 * np.trace(one.cov))


def test_kernel_is_the_sum_over_pairs() -> None:
    x, y = features(7), features(9, seed=2)
    k = lambda a, b: (a @ b / 5 + 1) ** 3  # noqa: E731
    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    np.testing.assert_allclose(distances.kernel(x, y, chunk=3), xx + yy - 2 * xy, rtol=1e-12)


def test_kernel_is_unbiased() -> None:
    """For samples of one distribution, the mean of many values is 0 within 3 standard errors."""
    draws = RNG.normal(size=(400, 2, 12, 3))
    values = np.array([distances.kernel(x, y) for x, y in draws])
    assert abs(values.mean()) < 3 * values.std() / 20
    assert (values < 0).mean() > 0.2  # The biased estimate, a squared norm, is never negative.


def test_inception_score() -> None:
    p = RNG.dirichlet(np.ones(4), size=50)
    expected = np.exp(np.mean([entropy(row, p.mean(axis=0)) for row in p]))
    np.testing.assert_allclose(distances.inception_score(p), expected, rtol=1e-12)
    np.testing.assert_allclose(distances.inception_score(np.eye(4)), 4)
    np.testing.assert_allclose(distances.inception_score(np.full((9, 4), 0.25)), 1)


def test_inception_score_where_a_class_is_never_seen() -> None:
    np.testing.assert_allclose(distances.inception_score(np.eye(4)[[0, 0, 2, 2], :]), 2)


def test_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are read in parts, for features and for images of integers."""
    monkeypatch.setattr(moments, "CHUNK", 300)
    x, others = features(30), features(700, seed=3)
    images = [RNG.integers(0, 256, (n, 4, 4, 3), np.uint8) for n in (30, 700)]
    for a, b in ((x, others), images):
        index, gaps = distances.nearest(a, b, chunk=8)
        every = distance.cdist(a.reshape(30, -1), b.reshape(700, -1))
        np.testing.assert_array_equal(index, every.argmin(axis=1))
        expected = every.min(axis=1) / np.sqrt(a[0].size)
        np.testing.assert_allclose(gaps, expected, rtol=1e-12)


def test_moments_of_parts_are_those_of_the_whole() -> None:
    """The features are far from 0, where a difference of sums of squares would lose its digits."""
    x = features(50, shift=1e5)
    whole = Moments.of_parts([x[:1], x[1:40], x[40:]])
    np.testing.assert_allclose(whole.mean, x.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(whole.cov, np.cov(x.T), rtol=1e-8, atol=1e-8)
    assert whole.size == 50 and distances.frechet(whole, whole) >= 0
