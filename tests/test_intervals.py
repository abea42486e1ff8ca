"""Error bars, outliers and the baselines of a report, compared with SciPy and with hand counts."""

import math

import numpy as np
import pytest
from scipy import special, stats
from sklearn.datasets import load_digits

from sbml.program.evaluation import baselines
from sbml.statistics import moments
from sbml.statistics.intervals import (
    difference,
    half_width,
    mean_interval,
    outliers,
    pareto_k,
    repeated_stderr,
)


def test_histogram_baseline_on_a_hand_count():
    """The add-one probabilities of two pixels with two levels and three training images."""
    train = np.array([[0, 1], [0, 1], [0, 0]], np.uint8)
    test = np.array([[0, 1], [1, 0]], np.uint8)
    expected = -np.log2([[4 / 5, 3 / 5], [1 / 5, 2 / 5]]).mean(axis=1)
    np.testing.assert_allclose(baselines.histogram(train, test, 2), expected)


def test_a_difference_of_two_samples_against_welch():
    generator = np.random.default_rng(0)
    one, other = generator.normal(2, 0.5, 40), generator.normal(1.9, 0.1, 7)
    gap = difference(mean_interval(one), mean_interval(other))
    expected = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    np.testing.assert_allclose(gap.bounds, expected)
    assert difference(mean_interval(one), mean_interval(other[:1])).ci95 == math.inf
    assert difference(mean_interval([1.0, 1.0]), mean_interval([0.5, 0.5])).bounds == (0.5, 0.5)


def test_gaussian_baseline_against_scipy():
    """The closed form is the mean of SciPy's log-density over a Sobol sequence of u."""
    digits = load_digits().images.astype(np.uint8)[:, 2:5, 2:4].reshape(-1, 6)
    train, test = digits[:1400], digits[1400:1410]
    model = stats.multivariate_normal(train.mean(0) + 0.5, np.cov(train.T) + np.eye(6) / 12)
    u = stats.qmc.Sobol(6, seed=0).random(2**14)[:, None]
    bits = -model.logpdf(test + u).mean(0) / 6 / math.log(2)
    np.testing.assert_allclose(baselines.gaussian(train, test), bits, atol=1e-4)


def test_diagonal_gaussian_baseline_is_the_full_one_of_uncorrelated_pixels():
    signs = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    train = (100 + signs * [10, 40]).astype(np.uint8)
    test = np.array([[90, 100], [200, 30]], np.uint8)
    var = np.array([100, 1600]) + 1 / 12
    r2 = (np.array([[90, 100], [200, 30]]) - 100.0) ** 2 + 1 / 12
    expected = (0.5 * (r2 / var + np.log(2 * np.pi * var))).mean(1) / math.log(2)
    np.testing.assert_allclose(baselines.diagonal_gaussian(train, test), expected)
    many = np.zeros((3, 65, 64, 1), np.uint8)
    values, left_out = baselines.all_of(many, many, 2)
    assert list(values) == ["per-pixel histogram", "diagonal Gaussian"] and not left_out


def test_moments_are_the_same_in_parts(monkeypatch):
    monkeypatch.setattr(moments, "CHUNK", 10)
    x = np.random.default_rng(0).integers(0, 256, (17, 2, 2), np.uint8)
    flat = x.reshape(17, 4)
    mean = moments.mean(x)
    np.testing.assert_allclose(mean, flat.mean(0))
    np.testing.assert_allclose(moments.variances(x, mean), flat.var(0))
    np.testing.assert_allclose(moments.covariance(x, mean), np.cov(flat, rowvar=False))
    with pytest.raises(ValueError, match="1 examples: a covariance needs at least two"):
        moments.covariance(x[:1], mean)


def test_interval_is_students():
    """The interval is SciPy's; with a value of NaN the mean is NaN."""
    values = np.random.default_rng(0).normal(2.0, 3.0, 12)
    low, high = stats.t.interval(0.95, 11, loc=values.mean(), scale=stats.sem(values))
    np.testing.assert_allclose(mean_interval(values).bounds, (low, high))
    skewed = mean_interval(values**2, skewed=True)  # Its lower end is Hall's T(-h) = -t.
    h, a = skewed.ci95 / skewed.stderr, stats.skew(values**2) * (11 / 12) ** 1.5 / 12**0.5
    transformed = -h + a * h**2 / 3 - a**2 * h**3 / 27 + a / 6
    assert transformed == pytest.approx(-stats.t.ppf(0.975, 11)) and a > 0.1
    assert mean_interval(-(values**2), skewed=True).ci95 == pytest.approx(skewed.ci95)
    for same in ([1.0], [2.0, 2.0]):
        assert mean_interval(same, skewed=True) == mean_interval(same)
    broken = mean_interval(np.array([1.0, np.nan]))
    assert broken.nonfinite == 1 and math.isnan(broken.mean)
    with pytest.raises(ValueError, match=r"values of shape \(0,\): a mean needs at least one"):
        mean_interval(np.array([]))


def test_noise_of_a_repeated_draw():
    """The standard error of a mean of independently noisy values, from a second draw of some."""
    rng = np.random.default_rng(0)
    sd = rng.uniform(0.5, 2.0, 400)
    first, second = rng.normal(0, sd), rng.normal(0, sd)
    stderr, freedom = repeated_stderr(first, second, 1000)
    assert freedom == pytest.approx(np.sum(sd**2) ** 2 / np.sum(sd**4), rel=0.25)
    assert stderr == pytest.approx(math.sqrt(np.mean(sd**2) / 1000), rel=0.15)
    assert repeated_stderr([], [], 10) == (math.inf, 0)
    assert repeated_stderr([1, 2, 3], [0, 2, 3], 3)[1] == 1  # only one image is noisy
    assert repeated_stderr([1.0, 2.0], [2.0, 1.0], 2)[1] == 2  # not more than the number of pairs
    assert repeated_stderr([1e-200, 0.0], [0.0, 1e-200], 2)[1] == 2
    assert repeated_stderr([1.0, np.inf], [2.0, 1.0], 2) == (math.inf, 2)


def test_fewer_degrees_of_freedom_where_noise_differs_between_images():
    """The coverage over 4,000 sets is 95% for equal noise. For unequal noise it is nearer to 95%
    than with m degrees of freedom."""
    rng = np.random.default_rng(0)
    n, m, trials = 200, 16, 4000
    counts = {spread: np.zeros(2) for spread in (0.0, 1.0)}
    for spread, count in counts.items():
        for _ in range(trials):
            sd = np.exp(spread * rng.normal(size=n))
            first, second = rng.normal(0, sd), rng.normal(0, sd[:m])
            stderr, freedom = repeated_stderr(first[:m], second, n)
            for i, f in enumerate((freedom, m)):
                count[i] += abs(first.mean()) < half_width(stderr, f)
    equal, unequal = (count / trials for count in counts.values())
    assert 0.94 < equal[0] < 0.965
    assert unequal[1] + 0.02 < unequal[0] < 0.95


def test_outliers_are_those_beyond_six_deviations_and_non_finite_values():
    values = np.random.default_rng(0).normal(2.0, 0.1, 500)
    assert len(outliers(values)) == 0
    values[[3, 77, 200]] = 5.0, np.nan, np.inf
    np.testing.assert_array_equal(outliers(values), [3, 77, 200])
    # The median deviation of a normal sample is 0.6745 standard deviations.
    quantiles = special.ndtri((np.arange(999) + 0.5) / 999)
    for far, expected in ((5.9, []), (6.1, [999])):
        np.testing.assert_array_equal(outliers(np.append(quantiles, far)), expected)
    np.testing.assert_array_equal(outliers(np.full(2, np.nan)), [0, 1])


def test_a_covariance_of_too_few_images_is_left_out() -> None:
    """From n images in d >= n dimensions it is singular. Then the variance 1 / 12 of u, which is
    added to it, would decide the likelihood."""
    rng = np.random.default_rng(0)
    few, enough = (rng.integers(0, 16, (n, 3, 3, 1)).astype(np.uint8) for n in (9, 10))
    values, left_out = baselines.all_of(few, few, 16)
    assert list(values) == ["per-pixel histogram"]
    (reason,) = left_out.values()
    assert reason.startswith("9 training images are no more than their 9 dimensions")
    both = ["per-pixel histogram", "full-covariance Gaussian"]
    values, left_out = baselines.all_of(enough, few, 16)
    assert list(values) == both and not left_out


@pytest.mark.parametrize("k", [0.0, 0.5, 1.0])
def test_the_tail_of_a_pareto_distribution_has_its_shape(k):
    """The estimate is within four standard errors of the shape; one is (1 + k) / sqrt(M) for the M
    draws of the tail. It is also near SciPy's maximum-likelihood estimate."""
    draws = stats.genpareto.rvs(k, size=20_000, random_state=0)
    found, count = pareto_k(draws * np.resize([1, -1], draws.size)), math.ceil(3 * 20_000**0.5)
    assert abs(found - k) < 4 * (1 + k) / math.sqrt(count)
    tail = np.sort(draws)[-count - 1 :]
    fitted = stats.genpareto.fit(tail[1:] - tail[0], floc=0)[0]
    assert found == pytest.approx((count * fitted + 5) / (count + 10), abs=0.03)


def test_k_is_nan_if_no_tail_can_be_fitted():
    draws = np.random.default_rng(0).normal(size=31)
    assert math.isnan(pareto_k(draws[:30])) and not math.isnan(pareto_k(draws))
    for values in (np.ones(500), np.append(np.ones(500), np.inf), np.append(np.ones(500), 2.0)):
        assert math.isnan(pareto_k(values))
