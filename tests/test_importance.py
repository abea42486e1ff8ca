"""Importance weights: several observations, as many samples as needed, and their forecast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy

import sbml
from sbml.core.types import Array, Key
from sbml.density.posterior import Importance

SDE, KEY = sbml.VP(), jax.random.key(3)
NOISE = 0.8  # the variance of an observation x of theta, whose prior is N(0, 1)


def score(theta: Array, t: Array, key: Key, x: Array) -> Array:
    """The score of p(theta | x) = N(x / (1 + v), v / (1 + v)) with v = NOISE."""
    alpha, sigma = SDE.mean_coef(t), SDE.std(t)
    return (alpha * x / (1 + NOISE) - theta) / (alpha**2 * NOISE / (1 + NOISE) + sigma**2)


SOLVER = sbml.ode.Solver(rtol=1e-5, atol=1e-5)
DENSITY = sbml.Density(score, SDE, (1,), eps=1e-5, condition_shape=(1,), solver=SOLVER, subset=4)


@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 20))])
@pytest.mark.usefixtures("unchecked")
def test_the_posterior_of_several_observations_is_the_conjugate_one(n: int) -> None:
    """Mean, variance and evidence of theta given x_1 .. x_n, by the normal distribution."""
    x = np.random.default_rng(n).normal(0.4, np.sqrt(NOISE), size=(n, 1))
    u = DENSITY.joint(x, lambda theta: jax.scipy.stats.norm.logpdf(theta).sum())
    found = DENSITY.importance(KEY, 1500, u, x[0])
    variance = NOISE / (n + NOISE)
    mean = x.sum() / (n + NOISE)
    together = scipy.stats.multivariate_normal(np.zeros(n), NOISE * np.eye(n) + 1).logpdf(x[:, 0])
    log_z = together - scipy.stats.norm(0, np.sqrt(1 + NOISE)).logpdf(x).sum()
    assert abs(found.log_z.mean - log_z) < 1.5 * found.log_z.ci95 < 0.5
    weights = scipy.special.softmax(found.log_weights)
    error = np.sqrt(variance / found.effective)
    of_sample = weights @ found.x[:, 0]
    assert abs(of_sample - mean) < 3 * error
    assert abs(weights @ (found.x[:, 0] - mean) ** 2 / variance - 1) < 5 / np.sqrt(found.effective)
    # The normal density itself, at three points, up to a constant.
    points = jnp.asarray([[-0.5], [0.1], [0.9]])
    exact = -((np.asarray(points)[:, 0] - mean) ** 2) / (2 * variance)
    values = np.asarray(jax.vmap(u)(points))
    np.testing.assert_allclose(values - values[0], exact - exact[0], atol=2e-3 * n)


@pytest.mark.usefixtures("unchecked")
def test_a_prior_on_a_box_gives_no_nan() -> None:
    """Outside the box the density is 0; inside, a uniform prior changes it by a constant."""
    x = jnp.asarray([[0.2], [0.5], [0.3]])

    def box(theta: Array) -> Array:
        return jnp.where(jnp.all(jnp.abs(theta) < 1), -jnp.log(2.0), -jnp.inf)

    u = DENSITY.joint(x, box)
    points = jnp.asarray([[0.0], [0.7], [1.5]])
    found = np.asarray(jax.vmap(u)(points))
    each = np.stack([DENSITY.log_prob(points, condition=one) for one in x])
    np.testing.assert_allclose(found[:2], each.sum(axis=0)[:2] + 2 * np.log(2), rtol=1e-5)
    assert found[2] == -np.inf
    assert np.isfinite(jax.jacfwd(u)(points[0])).all()
    result = DENSITY.importance(KEY, 300, u, x[0])
    assert np.isfinite(result.log_z.mean) and np.all(np.abs(result.x[result.log_weights > -9]) < 1)


@pytest.mark.usefixtures("unchecked")
def test_samples_are_drawn_until_they_suffice() -> None:
    d = sbml.Density(lambda x, t, key: -x, SDE, (1,), subset=4)
    target = lambda x: -jnp.sum((x - 0.5) ** 2) / 0.5  # noqa: E731
    first = d.importance(KEY, 50, target)
    found = d.importance(KEY, 50, target, target_ess=120, progress=True)
    n = len(found.x)
    assert n % 50 == 0 and found.effective >= 120
    assert (
        scipy.special.logsumexp(2 * found.log_weights[:-50])
        > 2
        * (  # fewer were too few
            scipy.special.logsumexp(found.log_weights[:-50])
        )
        - np.log(120)
    )
    np.testing.assert_array_equal(found.x[:50], first.x)
    assert len(np.unique(found.x)) == n
    few = d.importance(KEY, 50, target, target_ess=120, max_samples=149)
    assert len(few.x) == 100 and "below target_ess=120: with " in str(few)
    for options in ({"max_samples": 100}, {"max_samples": 49, "target_ess": 120}):
        with pytest.raises(
            ValueError, match="^max_samples=.* n=50: give a target_ess, and at least"
        ):
            d.importance(KEY, 50, target, **options)


def drawn(rng: np.random.Generator, n: int, proposal: float, target: float) -> np.ndarray:
    """Log weights for Student's t with the degrees of freedom ``target``, from ``proposal``."""
    x = rng.standard_t(proposal, size=n)
    found: np.ndarray = scipy.stats.t.logpdf(x, target) - scipy.stats.t.logpdf(x, proposal)
    return found


def of_weights(log_weights: np.ndarray) -> Importance:
    zero = np.zeros(4)
    return Importance.of(np.zeros((len(log_weights), 1)), log_weights, zero, zero - np.inf)


def test_the_forecast_of_the_effective_sample_size_holds_for_heavy_tails() -> None:
    """From 1,000 samples to 100,000: nine of ten intervals contain the truth. The heavier the tail,
    the wider they are."""
    rng, held, total = np.random.default_rng(0), 0, 0
    widths: dict[float, list[float]] = {}
    for proposal, target in ((10, 8), (10, 5), (10, 4), (4, 2.5)):
        for _ in range(6):
            pilot = of_weights(drawn(rng, 1000, proposal, target))
            truth = of_weights(drawn(rng, 100_000, proposal, target)).effective
            if pilot.heavy_tailed:
                with pytest.raises(ValueError, match="1000 samples allow no forecast.*HEAVY TAILS"):
                    pilot.forecast(100_000)
                continue
            low, high = pilot.forecast(100_000)
            held, total = held + (low <= truth <= high), total + 1
            widths.setdefault(target, []).append(high / low)
    assert total > 15 and held >= 0.85 * total
    assert np.median(widths[8]) < 1.1 < 1.5 < np.median(widths[5]) < np.median(widths[4])


def test_bounded_weights_and_few_samples() -> None:
    equal = of_weights(np.zeros(200))
    np.testing.assert_allclose(equal.forecast(5000), 5000)
    with pytest.raises(
        ValueError, match="^20 samples allow no forecast of n=100: take at least 35"
    ):
        of_weights(np.zeros(20)).forecast(100)
