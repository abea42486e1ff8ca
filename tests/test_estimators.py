"""What an evaluation adds up, row by row, is what the library gives for the same draws.

Data are a Gaussian of two numbers in four levels, under a VP that leaves much signal at T and a
solver that is loose, so that no term is too small to be missed.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import bound, dequantizers, discrete, estimators, likelihood, times
from sbml.divergence import Trace
from sbml.estimators import Cell
from sbml.ode import Solver
from sbml.sdes import VP
from sbml.verify import oracle

pytestmark = pytest.mark.usefixtures("x64")

LEVELS, SHAPE, SEED, SWEEP = 4, (1, 2, 1), 7, 3
PIXELS = jnp.asarray([[2, 1], [0, 3]]).reshape(2, *SHAPE)
EXACT, LOOSE = Trace("exact"), Solver(rtol=1.0, atol=1.0)
SDE = VP(beta_max=1.0)
DATA = oracle.Gaussian(SDE, jnp.array([-0.4, 0.3]), jnp.array([0.02, 0.1]), jnp.eye(2))
SCORE = jax.tree_util.Partial(DATA.score)
EPS = discrete.smallest_time(SDE, LEVELS, 1e-5)
ROWS = (PIXELS, jnp.arange(2), jnp.full(2, SWEEP), np.uint32(SEED))


def model_of(name):
    if name == "categorical":
        return None
    fields = {"tau": discrete.tau(SDE, LEVELS, EPS)} if name == "truncated_normal" else {}
    return dequantizers.get(name)(**fields)


def bits_per_dim(cell, found):
    """The sum of the terms that the cell says it has."""
    at_noise = cell.dequantizer != "uniform"
    scale = estimators.scale(cell, SDE, EPS, at_noise, SHAPE, LEVELS)
    return sum(np.asarray(found[term]) for term in cell.terms if term != "scale") + scale


def keys_of(i):
    """Of row i: of its dequantization, and of the rest."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEED), SWEEP), i)
    return jax.random.split(key)


@pytest.mark.parametrize("name", ["uniform", "truncated_normal"])
def test_the_odes_row_is_the_librarys_likelihood(name):
    model = model_of(name)
    how = {"dequantizer": model, "sde": SDE, "levels": LEVELS, "eps": EPS, "trace": EXACT}
    found = bits_per_dim(Cell("ode", name), estimators.ode(SCORE, {}, *ROWS, LOOSE, **how))
    for i, pixels in enumerate(PIXELS):
        u, log_q = model.sample({}, pixels, keys_of(i)[0])
        # Noise around a bin's centre is of the image as it is at eps, alpha times the data's.
        alpha = SDE.mean_coef(jnp.asarray(EPS)) if name == "truncated_normal" else 1.0
        x = alpha * (2 * (pixels + u) / LEVELS - 1)
        solved = likelihood.ode_logp(SCORE, SDE, x, None, eps=EPS, trace=EXACT, solver=LOOSE)
        assert abs(solved.correction) > 1e-6
        nats = -solved.logp + log_q + 2 * math.log(LEVELS / 2) - 2 * np.log(alpha)
        np.testing.assert_allclose(found[i], nats / (2 * math.log(2)), rtol=1e-9)


@pytest.mark.parametrize("name", ["uniform", "truncated_normal", "categorical"])
def test_the_bounds_row_is_the_librarys_bound(name):
    model, u = model_of(name), times.lattice(jax.random.key(1), 2, 3)
    how = {"dequantizer": model, "sde": SDE, "levels": LEVELS, "eps": EPS}
    terms = estimators.evidence_bound(SCORE, {}, *ROWS, u, None, None, **how)
    found = bits_per_dim(Cell("bound", name), terms)
    for i, pixels in enumerate(PIXELS):
        u_key, key = keys_of(i)
        if name == "uniform":
            x = 2 * (pixels + model.sample({}, pixels, u_key)[0]) / LEVELS - 1
            got = bound.elbo(SCORE, SDE, x, key, eps=EPS, u=u[i])
            nats = got.total + 2 * math.log(LEVELS / 2)
        else:
            how = {"kind": name, "levels": LEVELS, "eps": EPS, "u": u[i]}
            got = discrete.elbo(SCORE, SDE, pixels, key, **how)
            nats = got.total
        assert got.prior > 1e-3
        np.testing.assert_allclose(found[i], nats / (2 * math.log(2)), rtol=1e-9)


def test_a_draw_of_no_density_leaves_the_others_theirs():
    each = {"prior": jnp.array([jnp.inf, 1.0, 2.0]), "divergence": jnp.zeros(3)}
    found = estimators._averaged(each)
    expected = -np.log(np.exp([-1.0, -2.0]).sum() / 3)
    assert sum(found.values()) == pytest.approx(expected, rel=1e-6)
    each["prior"] = each["prior"].at[1].set(jnp.nan)
    assert np.isnan(sum(estimators._averaged(each).values()))
