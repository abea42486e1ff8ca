"""Intervals that cannot be trusted are marked. The score is that of a mixture, plus an error."""

import jax
import jax.numpy as jnp
import made_up
import numpy as np
import pytest

import sbml
from sbml import bound, times
from sbml.audit.program import oracle
from sbml.bound import GaussianControl, Reduction
from sbml.estimators.base import Target
from sbml.sdes import VP

pytestmark = pytest.mark.usefixtures("x64")

SDE, EPS, D, N, SWEEPS, REPETITIONS = VP(), 1e-3, 3, 32, 8, 40
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
    return [made_up.bound(each, target=Target(SDE, EPS), reduction=reduction) for each in found]


@pytest.mark.oracle
def test_intervals_that_miss_the_mean_are_marked_and_others_are_not():
    control = GaussianControl.fit(X)
    good = evaluations(Reduction(control))
    truth = np.mean([e.mean for e in good])

    def covered(found):
        return np.mean([abs(e.mean - truth) < e.this_set_ci95 for e in found])

    assert covered(good) > 0.85 and not any(e.heavy_tailed for e in good)
    assert not any("HEAVY" in str(e) for e in good)
    bad = evaluations(Reduction(control, proposal="velocity"))
    assert covered(bad) < 0.75 and all(e.heavy_tailed for e in bad)
    assert "HEAVY TAILS: Pareto's k of the draws is 0.9" in str(bad[0])


@pytest.mark.parametrize("kind", ["importance", "velocity", "uniform"])
def test_the_tail_of_the_weights_of_a_proposal(kind):
    """Over log-SNR, all weights of ``importance`` are equal. Those of the others exceed w with a
    probability of about 1 / w, up to the largest weight, which is at an end of the times."""
    k = Reduction(proposal=kind).tail(SDE, 1e-5)
    assert np.isnan(k) if kind == "importance" else 0.75 < k < 1.05


def test_rare_and_large_errors_of_a_score_are_seen_in_the_draws():
    """An error that is 300 times as large within a hundredth of the range of log-SNR."""
    first = SDE.log_snr(jnp.asarray(EPS))

    def spiked(x, t, key):
        near = jnp.exp(-0.5 * ((SDE.log_snr(t) - first + 6) / 0.03) ** 2)
        return DATA.score(x, t) - (0.1 + 30 * near) * jnp.cos(3 * x) / SDE.std(t)

    plain, wrong = (sbml.Density(s, SDE, (D,), eps=EPS).bound(X) for s in (score, spiked))
    assert not plain.heavy_tailed and "HEAVY" not in str(plain)
    assert wrong.heavy_tailed and "raise times_each" in str(wrong)
