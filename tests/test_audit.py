"""Audits: worlds are compared with lists of all images in NumPy, checks are tried on estimators
that fail them, and our estimators and the mistakes are audited in small worlds."""

import itertools
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from sbml.audit import Estimator, Numbers, audit, mistakes, ours, worlds
from sbml.audit.suite import CHECKS, FAIL, UNCLEAR, WORLDS, Report
from sbml.sdes import SDES
from sbml.statistics import intervals

SDE = SDES["vp"]()
RNG = np.random.default_rng(0)


def correlated(d: int, levels: int, correlation: float = 0.8) -> worlds.Listed:
    covariance = 0.5 * correlation ** np.abs(np.subtract.outer(np.arange(d), np.arange(d)))
    return worlds.gaussian(np.full(d, 0.1), covariance, levels, (1, d, 1))


def uneven_chain() -> worlds.Chain:
    first, transition = RNG.dirichlet(np.ones(3)), RNG.dirichlet(np.ones(3), 3)
    return worlds.Chain(3, (2, 3, 1), first, transition)


SMALL = {
    "uniform": worlds.uniform(4, (1, 2, 1)),
    "chain": worlds.chain(4, (1, 3, 1)),
    "uneven chain": uneven_chain(),
    "gaussian": correlated(3, 4),
    "random": worlds.random(1, 2, (2, 2, 1)),
}


def bin_likelihood(world: worlds.World, y: np.ndarray, rho: float, data: str) -> Any:
    """p(y_i | l) and E[x_i | y_i, l] by SciPy, each (d, L)."""
    centre = ((2 * np.arange(world.levels) + 1) / world.levels - 1)[None]
    y = y.reshape(-1, 1)
    if data == "centre":
        return stats.norm.pdf(y, centre, rho), np.broadcast_to(centre, (len(y), world.levels))
    a, b = ((centre + sign / world.levels - y) / rho for sign in (-1, 1))
    return stats.norm.cdf(b) - stats.norm.cdf(a), stats.truncnorm.mean(a, b, y, rho)


@pytest.mark.parametrize("name", SMALL)
def test_probabilities_and_entropy_of_all_images(name: str) -> None:
    world = SMALL[name]
    every = list(itertools.product(range(world.levels), repeat=world.dims))
    pixels = np.array(every, np.uint8).reshape(-1, *world.shape)
    np.testing.assert_array_equal(world.images, pixels)
    log_p = world.log_prob(pixels)
    assert log_p.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_p).sum(), 1, rtol=1e-12)
    np.testing.assert_allclose(world.entropy, -np.sum(np.exp(log_p) * log_p), rtol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_samples_have_these_probabilities(name: str) -> None:
    world, n = SMALL[name], 20_000
    samples = world.sample(3, n)
    assert samples.shape == (n, *world.shape) and samples.dtype == np.uint8
    place = (world.levels,) * world.dims
    found = np.bincount(
        np.ravel_multi_index(tuple(samples.reshape(n, -1).T), place), minlength=math.prod(place)
    )
    expected = n * np.exp(world.log_prob(world.images))
    many = expected > 5
    statistic = np.sum((found - expected)[many] ** 2 / expected[many])
    assert statistic < stats.chi2.isf(1e-4, many.sum())
    assert np.all(world.sample(3, 5) == world.sample(3, 5))


def test_images_do_not_follow_from_the_draws_of_an_estimator_with_the_same_seed() -> None:
    world = worlds.uniform(2, (1, 1, 1))
    draws = [np.random.default_rng(seed).random() < 0.5 for seed in range(400)]
    images = [world.sample(seed, 1).item() == 0 for seed in range(400)]
    assert abs(np.corrcoef(draws, images)[0, 1]) < 0.2


def test_the_row_of_the_chain_runs_from_left_to_right() -> None:
    world = uneven_chain()
    pixels = np.array([[[0], [2], [1]], [[1], [1], [0]]], np.uint8)
    t = world.transition
    probability = world.first[0] * t[0, 2] * t[2, 1] * world.first[1] * t[1, 1] * t[1, 0]
    np.testing.assert_allclose(world.log_prob(pixels[None]), [np.log(probability)])


def test_the_discretised_gaussian_has_the_density_of_the_centres() -> None:
    world, pixels = correlated(3, 4), np.array([[0, 1, 2], [3, 3, 1]], np.uint8)
    covariance = 0.5 * 0.8 ** np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    density = stats.multivariate_normal(np.full(3, 0.1), covariance)
    one, other = world.log_prob(pixels.reshape(2, 1, 3, 1))
    expected = np.diff(density.logpdf((2 * pixels + 1) / 4 - 1))[0]
    np.testing.assert_allclose(other - one, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("data", ["centre", "uniform"])
@pytest.mark.parametrize("name", SMALL)
def test_denoisers_against_a_sum_over_all_images(name: str, data: str) -> None:
    world = SMALL[name]
    t = np.array([1e-3, 0.05, 0.3])
    alpha, sigma = np.asarray(SDE.mean_coef(t)), np.asarray(SDE.std(t))
    shape = (-1, 1, 1, 1)
    x = (2 * world.sample(5, 3) + 1) / world.levels - 1
    x_t = alpha.reshape(shape) * x + sigma.reshape(shape) * RNG.normal(size=x.shape)
    flat = world.images.reshape(-1, world.dims)
    prior = np.exp(world.log_prob(world.images))
    expected = []
    for y, rho in zip(x_t / alpha.reshape(shape), sigma / alpha, strict=True):
        p, means = bin_likelihood(world, y, rho, data)
        entries = np.arange(world.dims)[None]
        joint = prior * np.prod(p[entries, flat], axis=1)
        # Means of bins without probability are not numbers in SciPy.
        of_images = np.where(p[entries, flat] > 0, means[entries, flat], 0)
        expected.append(joint @ of_images / joint.sum())
    denoiser = world.denoiser(SDE, data)
    found = np.asarray(denoiser(x_t, t))
    np.testing.assert_allclose(found.reshape(3, -1), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(denoiser(x_t[1], 0.05), found[1], rtol=1e-12)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("data", ["centre", "uniform"])
def test_the_score_of_the_denoiser_is_the_gradient_of_log_p(data: str) -> None:
    """Tweedie's formula, (alpha E[x_0 | x_t] - x_t) / sigma^2 = grad log p_t(x_t)."""
    world, t = SMALL["uneven chain"], jnp.asarray(0.1)
    alpha, sigma = SDE.mean_coef(t), SDE.std(t)
    flat = world.images.reshape(-1, world.dims)
    centre = (2 * flat + 1) / world.levels - 1
    half = 1 / world.levels

    def log_p(x: jax.Array) -> jax.Array:
        gap = (x.ravel()[None] - alpha * centre) / sigma
        if data == "centre":
            each = -0.5 * gap**2
        else:
            width = alpha * half / sigma
            cdf = jax.scipy.stats.norm.cdf
            each = jnp.log(cdf(gap + width) - cdf(gap - width))
        return jax.nn.logsumexp(world.log_prob(world.images) + each.sum(1))

    x = jnp.asarray(RNG.normal(size=world.shape))
    score = (alpha * world.denoiser(SDE, data)(x, t) - x) / sigma**2
    np.testing.assert_allclose(score, jax.grad(log_p)(x), rtol=1e-8, atol=1e-8)


# The checks, with estimators that know the probabilities.

PAIR = {"pair": correlated(2, 3), "chain": worlds.chain(8, (2, 4, 1))}


def exact(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return -denoiser.world.log_prob(pixels)


def noise(pixels: np.ndarray, seed: int, n: int | None = None) -> np.ndarray:
    return np.random.default_rng([seed, 7]).normal(size=len(pixels) if n is None else n)


def too_small(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return 0.99 * exact(denoiser, schedule, pixels, seed)


def for_improbable(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    """Two images have the probability 0.04 instead of 0.0034. The probabilities of the others are
    too small, but do not make up for this."""
    nats = exact(denoiser, schedule, pixels, seed)
    if schedule.levels > 3:
        return nats
    return np.where(nats > math.log(100), math.log(25), nats + 0.02)


def noisy(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return exact(denoiser, schedule, pixels, seed) + 0.3 * noise(pixels, seed)


def common_noise(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return exact(denoiser, schedule, pixels, seed) + 0.7 * noise(pixels, seed, 1)


def of_the_batch(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    """As if all images of a batch had one step size, which is smaller for few images."""
    return exact(denoiser, schedule, pixels, seed) + 0.0009 * len(pixels)


def unseeded(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return exact(denoiser, schedule, pixels, seed) + 1e-6 * np.random.default_rng().random()


def rounded(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> jax.Array:
    return jnp.asarray(exact(denoiser, schedule, pixels, seed), jnp.bfloat16)


def with_error_bar(factor: float) -> Any:
    def nats(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> Numbers:
        values = noisy(denoiser, schedule, pixels, seed)
        return Numbers(values, factor * 0.3 / math.sqrt(len(pixels)))

    return nats


def lucky(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> Numbers:
    """Standard errors whose mean square is right: three of four are 0."""
    found = with_error_bar(2.0)(denoiser, schedule, pixels, seed)
    return found if seed % 4 == 0 else found._replace(stderr=0.0)


def infinite(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    nats = exact(denoiser, schedule, pixels, seed)
    return np.where(nats > 6, np.inf, nats)


def loose(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    return exact(denoiser, schedule, pixels, seed) + 0.1


def checked(nats: Any, within: float = math.inf, **options: Any) -> Report:
    return audit(Estimator(nats.__name__, nats, "centre", within), PAIR, calls=32, **options)


def test_the_exact_numbers_pass() -> None:
    report = checked(exact, 0.001)
    assert report.passed and not report.failed
    assert {f.check for f in report.findings} == {*CHECKS} - {"error bar"}
    assert report.excess == pytest.approx({"pair": 0, "chain": 0}, abs=1e-12)
    [(total, tolerance)] = [
        (f.value, f.tolerance) for f in report.findings if f.check == "normalised"
    ]
    assert total == pytest.approx(1) and tolerance == pytest.approx(0, abs=1e-7)
    assert checked(noisy, 0.001).passed


@pytest.mark.parametrize(
    ("nats", "failing"),
    [
        (too_small, {"bound", "normalised"}),
        (common_noise, {"coverage"}),
        (unseeded, {"repeatable"}),
        (infinite, {"complete"}),
        (loose, {"tight"}),
        (of_the_batch, {"independent"}),
        (for_improbable, {"normalised"}),
        (rounded, {"precise"}),
        (with_error_bar(1.5), {"error bar"}),
        (with_error_bar(0.6), {"error bar"}),
        (lucky, {"error bar"}),
    ],
)
def test_each_check_fails_alone(nats: Any, failing: set[str]) -> None:
    report = checked(nats, 0.01)
    assert report.failed == failing and not report.passed


def two_draws(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> Numbers:
    """Means of two draws, with Student's interval for one degree of freedom."""
    draws = [noisy(denoiser, schedule, pixels, 2 * seed + i) for i in range(2)]
    error = abs(np.mean(draws[0] - draws[1])) / 2
    return Numbers(np.mean(draws, axis=0), error, intervals.half_width(error, 1))


def two_draws_without_interval(*call: Any) -> Numbers:
    return two_draws(*call)._replace(ci95=None)


@pytest.mark.parametrize("nats", [with_error_bar(1.0), two_draws, two_draws_without_interval])
def test_a_right_error_bar_passes(nats: Any) -> None:
    report = checked(nats, 0.01)
    assert report.passed and {f.check for f in report.findings} == set(CHECKS)


def test_the_sum_of_probabilities_has_no_bias_by_noise() -> None:
    """With the noise of 8 calls, sum_k exp(-mean nats_k) itself is too large by a fiftieth."""

    def wild(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
        return exact(denoiser, schedule, pixels, seed) + 0.6 * noise(pixels, seed)

    sums = []
    for seed in range(0, 4000, 40):
        report = audit(
            Estimator("", wild, "centre"), {"pair": PAIR["pair"]}, calls=8, repetitions=0, seed=seed
        )
        sums += [f.value for f in report.findings if f.check == "normalised"]
    assert abs(np.mean(sums) - 1) < 4 * np.std(sums) / math.sqrt(len(sums))
    assert np.std(sums) / math.sqrt(len(sums)) < 0.01


def test_a_number_that_is_too_noisy_is_unclear() -> None:
    def wild(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
        return exact(denoiser, schedule, pixels, seed) + 9 * noise(pixels, seed)

    report = checked(wild, repetitions=0)
    assert not report.passed and not report.failed
    assert {f.check for f in report.findings if f.verdict == UNCLEAR} == {"bound", "normalised"}


def test_the_report_is_a_table_and_plain_values() -> None:
    report = checked(too_small, repetitions=50)
    assert str(report).endswith(f"too_small: NOT PASSED, in {report.seconds:.1f} s")
    assert sum(FAIL in line for line in str(report).splitlines()) == 3
    values = json.loads(json.dumps(report.as_dict()))
    assert values["failed"] == ["bound", "normalised"] and not values["passed"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"returned shape \(1, 1\) for 1 images"):
        checked(lambda d, s, pixels, seed: np.zeros((len(pixels), 1)))
    with pytest.raises(ValueError, match="calls is 4: give an integer of at least 8"):
        audit(Estimator("", exact), PAIR, calls=4)


def numpy_bound(denoiser: Any, schedule: Any, pixels: np.ndarray, seed: int) -> np.ndarray:
    """The bound with the categorical decoder, in NumPy, by the sum over a fine chain."""
    rng, levels = np.random.default_rng(seed), schedule.levels
    t = np.linspace(0.02, 1, 400) ** 2
    alpha, sigma = (np.asarray(f(t), np.float64) for f in (schedule.alpha, schedule.sigma))
    weight = 0.5 * np.diff(-2 * np.log(alpha / sigma))
    x = (2 * pixels.astype(float) + 1) / levels - 1
    nats = 0.5 * (alpha[-1] * x) ** 2 + 0.5 * (sigma[-1] ** 2 - 1 - 2 * np.log(sigma[-1]))
    shape = (len(t) - 1, 1, 1, 1, 1)
    a, s = (0.5 * (c[1:] + c[:-1]).reshape(shape) for c in (alpha, sigma))
    middle = 0.5 * (t[1:] + t[:-1])
    a, s = (np.asarray(f(middle)).reshape(shape) for f in (schedule.alpha, schedule.sigma))
    z = rng.normal(size=(len(middle), *x.shape))
    x_t = a * x + s * z
    noise = (x_t - a * np.asarray(denoiser(x_t, middle[:, None]))) / s
    nats = nats + np.sum(weight.reshape(shape) * (z - noise) ** 2, axis=0)
    y = x + sigma[0] / alpha[0] * rng.normal(size=x.shape)
    centres = (2 * np.arange(levels) + 1) / levels - 1
    gaps = -0.5 * ((y[..., None] - centres) * alpha[0] / sigma[0]) ** 2
    chosen = np.take_along_axis(gaps, pixels[..., None].astype(int), -1)[..., 0]
    return (nats + special.logsumexp(gaps, axis=-1) - chosen).sum((1, 2, 3))


def test_an_estimator_in_numpy() -> None:
    estimator = Estimator("", numpy_bound, "centre", 0.02)
    report = audit(estimator, {"pair": PAIR["pair"]}, calls=16, repetitions=100)
    assert report.passed, str(report)


# Ours, and the mistakes.

TINY: dict[str, worlds.World] = {"tiny": correlated(2, 3)}
CHAIN: dict[str, worlds.World] = {"chain": worlds.chain(4, (1, 3, 1))}


# ``--mode=verify`` audits each estimator and each mistake in larger worlds and with more calls, and
# CI runs it. Here are one estimator of each kind, and one mistake for each set of checks that fail.
OF_EACH_KIND = {
    "ODE, exact trace",
    "Density.bits_per_dim, one probe",
    "bound",
    "bound on P(k), decoder",
}
OURS = [estimator for estimator in ours.OURS if estimator.name in OF_EACH_KIND]
FEW_MISTAKES = {
    "0.01 bits/dim below the truth",
    "test images dropped",
    "a total in bfloat16",
    "few steps read as continuous",
    "outliers replaced by the median",
    "times drawn evenly",
    "an error bar that is right only on average",
}
MISTAKES = {e: fails for e, fails in mistakes.MISTAKES.items() if e.name in FEW_MISTAKES}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", OURS, ids=lambda e: e.name)
def test_ours_do_not_fail(estimator: Estimator) -> None:
    """With an eighth of the usual calls, for which many numbers are unclear."""
    report = audit(estimator, TINY, calls=8, repetitions=0)
    assert not report.failed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: m.name)
def test_mistakes_are_caught(mistake: Estimator) -> None:
    fails = MISTAKES[mistake]
    many = fails & {"coverage", "error bar"}
    world, calls, repetitions = (CHAIN, 8, 120) if many else (TINY, 32, 0)
    if "median" in mistake.name:  # In a world of nine images, the first is no outlier.
        world, calls = {"gaussian": WORLDS["gaussian"]}, 12
    if "tight" in fails:  # Its error is small compared with the noise of a call.
        calls = 64
    report = audit(mistake, world, calls=calls, repetitions=repetitions)
    assert report.failed == fails, str(report)


def test_each_mistake_has_its_mechanism() -> None:
    for mistake, fails in mistakes.MISTAKES.items():
        assert len(mistake.nats.__doc__.split()) > 50
        assert fails <= set(CHECKS)
    assert set(MISTAKES.values()) == set(mistakes.MISTAKES.values())
