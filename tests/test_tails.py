"""Intervals that cannot be trusted are marked.

The score of the bounds is that of a mixture, plus an error.
"""

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest

import sbml
from sbml.audit import oracle
from sbml.density.density import _walk
from sbml.density.estimators.base import Target
from sbml.density.posterior import Importance
from sbml.likelihood import bound
from sbml.likelihood.bound import GaussianControl, Reduction
from sbml.sdes import VP, times
from sbml.statistics import intervals

pytestmark = pytest.mark.usefixtures("x64")

SDE, EPS, D, N, SWEEPS, REPETITIONS = VP(), 1e-7, 3, 32, 8, 40
DATA = oracle.mixture(SDE, D)
PART = oracle.gaussian(SDE, D, 1, 0.2)
X = np.asarray(PART.mean + 0.2 * np.random.default_rng(0).normal(size=(N, D)))


def score(x, t, key):
    """The predicted noise has an error of 0.5 cos(3 x) at every time."""
    return DATA.score(x, t) - 0.5 * jnp.cos(3 * x) / SDE.std(t)


@jax.jit
def tables(reduction, key):
    """The bounds ``(SWEEPS, N)`` of one evaluation."""

    def sweep(key):
        u_key, key = jax.random.split(key)
        draws = jax.random.split(key, N), times.lattice(u_key, N, 2)

        def one(x, key, u):
            return bound.elbo(score, SDE, x, key, eps=EPS, u=u, reduction=reduction).total

        return jax.vmap(one)(jnp.asarray(X), *draws)

    return jax.lax.map(sweep, jax.random.split(key, SWEEPS))


def evaluations(reduction):
    """Estimates by independent evaluations of the same examples."""
    keys = jax.random.split(jax.random.key(0), REPETITIONS)
    found = np.asarray(jax.lax.map(lambda key: tables(reduction, key), keys))
    estimator = made_up.OneTerm(reduction=reduction)
    return [made_up.bound(e, target=Target(SDE, EPS), estimator=estimator) for e in found]


@pytest.mark.slow
@pytest.mark.oracle
def test_intervals_that_miss_the_mean_are_marked_and_others_are_not():
    control = GaussianControl.fit(X)
    good = evaluations(Reduction(control))
    truth = np.mean([e.mean for e in good])

    def covered(found):
        return np.mean([abs(e.mean - truth) < e.this_set.ci95 for e in found])

    assert covered(good) > 0.85 and not any(e.heavy_tailed for e in good)
    assert not any("HEAVY" in str(e) for e in good)
    bad = evaluations(Reduction(control, proposal="uniform"))
    assert covered(bad) < 0.75 and all(e.heavy_tailed for e in bad)
    assert "HEAVY TAILS: Pareto's k of the draws or of the weights of their times is 0.9" in str(
        bad[0]
    )


@pytest.mark.parametrize("kind", ["importance", "uniform"])
def test_the_tail_of_the_weights_of_a_proposal(kind):
    """Over log-SNR, all weights of ``importance`` are equal. Those of ``uniform`` exceed w
    with a probability of about 1 / w, up to the largest weight, which is at an end of the times."""
    k = Reduction(proposal=kind).tail(SDE, 1e-5)
    assert np.isnan(k) if kind == "importance" else 0.75 < k < 1.05


@pytest.mark.slow
def test_rare_and_large_errors_of_a_score_are_seen_in_the_draws():
    """An error that is 300 times as large within a hundredth of the range of log-SNR."""
    first = SDE.log_snr(jnp.asarray(EPS))

    def spiked(x, t, key):
        near = jnp.exp(-0.5 * ((SDE.log_snr(t) - first + 6) / 0.03) ** 2)
        return DATA.score(x, t) - (0.1 + 30 * near) * jnp.cos(3 * x) / SDE.std(t)

    plain, wrong = (sbml.Density(s, SDE, (D,), eps=EPS).bound(X) for s in (score, spiked))
    assert not plain.heavy_tailed and "HEAVY" not in str(plain)
    assert wrong.heavy_tailed and "raise times_each" in str(wrong)


def importance(rng, n, d, std):
    """Samples of N(0, I) with weights for N(0, std^2 I); log Z is 0."""

    def log_weights(x):
        return np.sum(0.5 * x**2 - 0.5 * (x / std) ** 2, axis=1) - d * np.log(std)

    x, y = rng.normal(size=(n, d)), std * rng.normal(size=(min(n, 128), d))
    return Importance.of(x, log_weights(x), np.zeros(1), log_weights(y))


def test_unmarked_intervals_of_log_z_contain_it_and_bounded_weights_are_not_marked():
    """A proposal that is too narrow: the smaller its largest weight, the more is missing."""
    rng, unmarked = np.random.default_rng(0), []
    for std, d in [(1.6, 1), (2.0, 1), (3.0, 1), (2**0.5, 16), (1.2, 1)]:
        found = [importance(rng, n, d, std) for n in (50, 200) for _ in range(40)]
        covered = np.array([abs(f.log_z.mean) < f.log_z.ci95 for f in found])
        kept = np.array([not f.heavy_tailed for f in found])
        unmarked.extend(covered[kept])
        assert any("of Z lies in weights above those of all samples" in str(f) for f in found)
        assert covered.mean() < (0.85 if std > 1.2 else 0.9) and not covered[~kept].all()
    assert np.mean(unmarked) > 0.9 and len(unmarked) > 40
    for std in (0.3, 0.5, 0.8, 1.0):
        found = [importance(rng, n, 1, std) for n in (50, 200) for _ in range(20)]
        assert np.mean([f.heavy_tailed for f in found]) <= 0.05
    wide = importance(rng, 50, 16, 0.3)
    assert wide.heavy_tailed and "too narrow" not in str(wide)


def test_the_walks_of_importance_draw_from_the_target():
    """Normal numbers of the standard deviations 0.5, 1 and 3, from samples of N(0, I)."""
    std, n = jnp.array([0.5, 1.0, 3.0]), 400
    keys = jax.random.split(jax.random.key(0), n)
    start = jax.random.normal(jax.random.key(1), (n, 3))

    def u(x):
        return -0.5 * jnp.sum((x / std) ** 2)

    y, u_y = jax.vmap(lambda *s: _walk(u, 1.4 * jnp.ones(3), s))(start, keys)
    np.testing.assert_allclose(y.std(axis=0), std, rtol=4 / np.sqrt(2 * n))
    np.testing.assert_allclose(u_y, jax.vmap(u)(y))


@pytest.mark.parametrize("n", [8, 16, 40, 512])
def test_one_draw_that_decides_the_error_bar_is_marked_whatever_their_number(n):
    draws = np.random.default_rng(0).normal(size=n)
    assert not intervals.pareto_k(draws) > intervals.HEAVY
    draws[0] = 100.0
    assert intervals.pareto_k(draws) > intervals.HEAVY
    assert "more than 90% of the sum" in str(made_up.bound(draws.reshape(4, -1)))
