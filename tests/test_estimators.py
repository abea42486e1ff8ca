"""The terms of an estimator add up to the library's result for the same draws, for every example.

The data are a Gaussian of two numbers in four levels. The VP leaves much signal at T and the solver
is loose, so that every term is large enough for an error in it to show.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from sbml import dequantizers, likelihood
from sbml.audit import oracle
from sbml.core import bits
from sbml.core.streams import stream
from sbml.density import estimators
from sbml.density.estimators import base, ode
from sbml.density.estimators.base import Rows, Target
from sbml.likelihood import bound, discrete
from sbml.likelihood.ode import Solver
from sbml.score.divergence import Trace
from sbml.sdes import VP, times

pytestmark = pytest.mark.usefixtures("x64")

LEVELS, SHAPE, SEED, SWEEP = 4, (1, 2, 1), 7, 3
PIXELS = jnp.asarray([[2, 1], [0, 3]]).reshape(2, *SHAPE)
EXACT, LOOSE = Trace("exact"), Solver(rtol=1.0, atol=1.0)
SDE = VP(beta_max=1.0)
DATA = oracle.Gaussian(SDE, jnp.array([-0.4, 0.3]), jnp.array([0.02, 0.1]), jnp.eye(2))
SCORE = jax.tree_util.Partial(DATA.score)
EPS = discrete.smallest_time(SDE, LEVELS, 1e-5)
NOISES = {"truncated_normal": discrete.TruncatedNormal, "categorical": discrete.Categorical}
ROWS = Rows(PIXELS, jnp.arange(2), jnp.full(2, SWEEP), np.uint32(SEED))


@jax.jit
def solve(x):
    return likelihood.ode_logp(SCORE, SDE, x, None, eps=EPS, trace=EXACT, solver=LOOSE)


def model_of(name):
    fields = {"tau": discrete.tau(SDE, LEVELS, EPS)} if name == "truncated_normal" else {}
    return dequantizers.DEQUANTIZERS[name](**fields)


def bits_per_dim(estimator, model, u=None):
    """The sum of the terms that the estimator names."""
    target = Target(SDE, EPS, LEVELS, model)
    compiled = jax.jit(base.rows, static_argnames="target")
    columns = compiled(estimator, target, SCORE, {}, ROWS, u)
    columns["scale"] = bits.nats_to_bits(estimator.scale_nats(target, SHAPE), SHAPE)
    return sum(np.asarray(columns[term]) for term in estimator.terms)


def keys_of(i):
    """The keys of row i: for its dequantization, and for all other draws."""
    key = base.draw_key(SEED, SWEEP, i)
    return stream(key, "dequantization"), stream(key, "bound")


@pytest.mark.parametrize(
    "name", [pytest.param("uniform", marks=pytest.mark.slow), "truncated_normal"]
)
def test_the_odes_row_is_the_librarys_likelihood(name):
    model = model_of(name)
    values = bits_per_dim(ode.Estimator(EXACT, solver=LOOSE), model)
    for i, pixels in enumerate(PIXELS):
        u, log_q = model.sample({}, pixels, keys_of(i)[0])
        # With noise around a bin's centre, x is the image at eps, which is scaled by alpha.
        alpha = SDE.mean_coef(jnp.asarray(EPS)) if name == "truncated_normal" else 1.0
        x = alpha * (2 * (pixels + u) / LEVELS - 1)
        solved = solve(x)
        assert abs(solved.correction) > 1e-6
        nats = -solved.logp + log_q + 2 * math.log(LEVELS / 2) - 2 * np.log(alpha)
        np.testing.assert_allclose(values[i], nats / (2 * math.log(2)), rtol=1e-9)


@pytest.mark.parametrize(
    "name",
    ["uniform", "truncated_normal", pytest.param("categorical", marks=pytest.mark.slow)],
)
def test_the_bounds_row_is_the_librarys_bound(name):
    model, u = model_of(name), times.lattice(jax.random.key(1), 2, 3)
    values = bits_per_dim(estimators.ESTIMATORS["bound"](), model, u)

    @jax.jit
    def elbo(pixels, keys, u):
        if name == "uniform":
            x = 2 * (pixels + model.sample({}, pixels, keys[0])[0]) / LEVELS - 1
            return bound.elbo(SCORE, SDE, x, keys[1], eps=EPS, u=u)
        noise = NOISES[name](LEVELS)
        return discrete.elbo(SCORE, SDE, pixels, keys[1], noise=noise, eps=EPS, u=u)

    for i, pixels in enumerate(PIXELS):
        got = elbo(pixels, keys_of(i), u[i])
        nats = got.total + (2 * math.log(LEVELS / 2) if name == "uniform" else 0)
        assert got.prior > 1e-3
        np.testing.assert_allclose(values[i], nats / (2 * math.log(2)), rtol=1e-9)


@dataclasses.dataclass(frozen=True)
class Triangle:
    """u is the mean of two uniform numbers, whose density is a triangle."""

    at_noise: ClassVar[bool] = False

    def sample(self, params, pixels, key):
        u = jax.random.uniform(key, (2, *pixels.shape)).mean(0)
        return u, jnp.sum(jnp.log(4 * jnp.minimum(u, 1 - u)))


@pytest.mark.parametrize(
    ("name", "trace"),
    [("bound", None), pytest.param("bound_ssm", EXACT, marks=pytest.mark.slow)],
)
def test_log_q_is_a_term_of_every_bound(name, trace):
    u, kind = times.lattice(jax.random.key(1), 2, 3), estimators.ESTIMATORS[name]
    estimator = kind() if trace is None else kind(trace=trace)
    values = bits_per_dim(estimator, Triangle(), u)

    @jax.jit
    def elbo(x, key, u):
        return bound.elbo(SCORE, SDE, x, key, eps=EPS, u=u, trace=trace).total

    for i, pixels in enumerate(PIXELS):
        draw_key, key = keys_of(i)
        v, log_q = Triangle().sample({}, pixels, draw_key)
        assert abs(log_q) > 0.1
        nats = elbo(2 * (pixels + v) / LEVELS - 1, key, u[i]) + log_q + 2 * math.log(LEVELS / 2)
        np.testing.assert_allclose(values[i], nats / (2 * math.log(2)), rtol=1e-9)


def test_k_draws_are_the_log_of_their_mean_weight():
    """The weights are p / q, each at its draw's own u; the density q is not constant."""
    model, count = Triangle(), 3
    values = bits_per_dim(ode.Estimator(EXACT, count, LOOSE), model)
    for i, pixels in enumerate(PIXELS):
        weights = []
        for key in jax.random.split(base.draw_key(SEED, SWEEP, i), count):
            u, log_q = model.sample({}, pixels, stream(key, "dequantization"))
            weights.append(float(solve(2 * (pixels + u) / LEVELS - 1).logp - log_q))
        nats = math.log(count) - special.logsumexp(weights) + 2 * math.log(LEVELS / 2)
        np.testing.assert_allclose(values[i], nats / (2 * math.log(2)), rtol=1e-9)


def test_a_draw_of_density_0_has_weight_0():
    each = {"prior": jnp.array([jnp.inf, 1.0, 2.0]), "divergence": jnp.zeros(3)}
    terms = ode.averaged(each)
    expected = -np.log(np.exp([-1.0, -2.0]).sum() / 3)
    assert sum(terms.values()) == pytest.approx(expected, rel=1e-6)
    each["prior"] = each["prior"].at[1].set(jnp.nan)
    assert np.isnan(sum(ode.averaged(each).values()))


class AtNoise:
    """A dequantizer that draws noise around bin centres, and has no bound of its own."""

    at_noise = True
    sample = staticmethod(lambda params, pixels, key: (jnp.full(pixels.shape, 0.5), jnp.zeros(())))


def test_a_dequantizer_at_noise_without_a_bound_is_refused():
    """It must not get the bound of the truncated normal, which is another number."""
    with pytest.raises(
        ValueError, match="has no bound of its own .* give its Model a method bound"
    ):
        bits_per_dim(estimators.ESTIMATORS["bound"](), AtNoise(), jnp.ones((2, 1)) / 2)


@pytest.mark.parametrize(
    ("estimator", "dequantizer", "count", "reason"),
    [
        ("ode", "categorical", 1, "no density to solve for"),
        ("bound_ssm", "categorical", 1, "denoising form only"),
        ("bound_ssm", "truncated_normal", 1, "denoising form only"),
        ("bound", "uniform", 2, "K noisy draws of it bounds nothing"),
        ("bound_ssm", "uniform", 2, "K noisy draws of it bounds nothing"),
        ("ode", "truncated_normal", 4, ""),
        ("bound", "categorical", 1, ""),
        ("bound_ssm", "variational", 1, ""),
    ],
)
def test_undefined_numbers_have_a_reason(estimator, dequantizer, count, reason):
    undefined = estimators.Cell(estimator, dequantizer, count).reason_undefined
    assert (reason in undefined) if reason else undefined == ""
