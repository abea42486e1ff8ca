"""The error that the prior in place of p_T leaves in an exact score's log p_eps."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml.audit import oracle
from sbml.core.scalars import notation
from sbml.likelihood import ode_logp, prior_error
from sbml.likelihood.ode import Solver
from sbml.score.divergence import Trace
from sbml.sdes import SDE, SDES, VP, RectifiedFlow

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-3
MEAN, VARIANCES = np.array([0.8, -0.6]), np.array([0.5, 0.02])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "one"), [("ve", 0.02), ("linear_gamma", 0.08)])
def test_the_error_of_an_exact_score_is_the_priors(name: str, one: float) -> None:
    """The error of an example is log pi(z) - log p_T(z), about alpha / s; its mean over p_eps is
    -KL(p_T || pi).

    The error is quadratic in x. Its mean over p_eps is therefore its mean over the 2 d points
    m +- sqrt(d) sigma_i e_i, where m and sigma_i belong to p_eps.
    """
    sde = SDES[name]()
    data = oracle.Gaussian(sde, jnp.asarray(MEAN), jnp.asarray(VARIANCES), jnp.eye(2))
    spread = jnp.diag(jnp.sqrt(2 * data.variances(jnp.asarray(EPS))))
    x = sde.mean_coef(jnp.asarray(EPS)) * MEAN[None] + jnp.concatenate([spread, -spread])

    @jax.jit
    @jax.vmap
    def solved(x):
        tight = Solver(rtol=1e-9, atol=1e-9)
        return ode_logp(data.score, sde, x, None, eps=EPS, trace=Trace("exact"), solver=tight)

    found, last = solved(x), jnp.asarray(sde.T)
    error = found.logp - jax.vmap(lambda x: data.logp(x, jnp.asarray(EPS)))(x)
    prior = jax.vmap(sde.prior_logp)(found.z) - jax.vmap(lambda z: data.logp(z, last))(found.z)
    np.testing.assert_allclose(error, prior, atol=1e-7)
    assert one / 3 < np.max(np.abs(error)) < 2 * one

    alpha, sigma, s = sde.mean_coef(last), sde.std(last), sde.prior_std
    variances = alpha**2 * VARIANCES + sigma**2
    second = (alpha**2 * MEAN**2 + variances) / s**2
    divergence = 0.5 * jnp.sum(second - 1 - jnp.log(variances / s**2))
    np.testing.assert_allclose(np.mean(error), -divergence, atol=1e-7)
    assert divergence > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(("sde", "each"), [(VP(), 0.0198), (RectifiedFlow(), 0.003)])
def test_the_printed_prior_error_is_the_error_of_an_exact_score(sde: SDE, each: float) -> None:
    """For a mean of norm 3. The ODE of a flow ends where 0.1% of the signal is left."""
    n, mean, t = 400, 3 * np.array([0.6, -0.8]), jnp.asarray(EPS)
    data = oracle.Gaussian(sde, jnp.asarray(mean), jnp.asarray(VARIANCES), jnp.eye(2))
    z = np.random.default_rng(0).normal(size=(n, 2))
    x = np.asarray(sde.mean_coef(t) * mean[None] + jnp.sqrt(data.variances(t))[None] * z)
    tight, trace = Solver(rtol=1e-6, atol=1e-6), Trace("exact")
    density = sbml.Density(data.score, sde, (2,), eps=EPS, trace=trace, solver=tight)
    result = density.logp(x)
    error = result.values - np.asarray(jax.vmap(lambda x: data.logp(x, t))(jnp.asarray(x)))
    prior = result.prior_error
    assert abs(error.mean() + prior.mean) < 4 * prior.each / math.sqrt(n)
    np.testing.assert_allclose(error.std(), prior.each, rtol=0.15)
    line = f"error of the prior: {notation(prior.mean, '.2g')} nats in the mean, KL(p_T"
    assert line in str(result).splitlines()[1]
    assert prior.each == pytest.approx(each, rel=0.02)


def test_a_bound_has_no_prior_error_and_a_larger_beta_max_makes_it_smaller() -> None:
    small, large = (prior_error(VP(0.1, end), MEAN, VARIANCES).each for end in (30.0, 20.0))
    assert small < large / 10
    density = sbml.Density(lambda x, t, key: -x, VP(), (2,), eps=EPS)
    assert density.bound(np.ones((4, 2)), reduce=False).prior_error is None


@pytest.mark.slow
def test_the_posterior_of_a_class_has_the_prior_error_of_the_classes() -> None:
    """Of two classes with means m and -m, whose common mean is 0."""
    sde, n, mean, std = VP(), 40, np.array([0.6, 0.8]), 1.0

    def score(x, t, key, c):
        alpha = sde.mean_coef(t)
        return -(x - alpha * c * mean) / (alpha**2 * std**2 + sde.std(t) ** 2)

    rng, alpha = np.random.default_rng(0), float(sde.mean_coef(jnp.asarray(EPS)))
    signs = np.array([1.0, -1.0])
    x = np.resize(signs, n)[:, None] * mean + std * rng.normal(size=(n, 2))
    tight = Solver(rtol=1e-6, atol=1e-6)
    density = sbml.Density(score, sde, (2,), eps=EPS, solver=tight)
    found = density.classify(x, signs)
    variance = alpha**2 * std**2 + float(sde.std(jnp.asarray(EPS))) ** 2
    logits = 2 * alpha * x @ mean / variance
    wrong = np.abs(found.probabilities[:, 0] - jax.nn.sigmoid(logits))
    assert 0.5 < found.prior / wrong.mean() < 3
    assert found.solver_error.mean < wrong.mean() / 20
    truth = -((x[:, None] - alpha * signs[:, None] * mean) ** 2).sum(axis=2) / (2 * variance)
    errors = found.log_prob - truth + np.log(2 * np.pi * variance)
    np.testing.assert_allclose(found.log_prob_prior, errors.std(), rtol=0.5)
    assert f"a probability by about {notation(found.prior, '.2g')}" in str(found)


def test_a_larger_end_is_another_choice_of_the_betas() -> None:
    """As the docstring of ``sbml.likelihood`` says: t in [0, c] is t / c in [0, 1]."""
    b, largest, c = 0.1, 20.0, 1.5
    short, t = VP(b, largest), np.linspace(0.1, 0.9, 5)
    longer = VP(c * b, c * (b + c * (largest - b)))
    np.testing.assert_allclose(longer.log_snr(jnp.asarray(t / c)), short.log_snr(jnp.asarray(t)))


def test_bits_per_dim_have_the_prior_error_of_the_dequantized_integers() -> None:
    sde, k = VP(), np.random.default_rng(0).integers(3, 8, (50, 2, 2))
    x = 2 * (k + np.random.default_rng(1).random((4000, 50, 2, 2))) / 8 - 1
    variances, means = x.var(axis=(0, 1)).ravel(), x.mean(axis=(0, 1)).ravel()
    alpha2, sigma2 = (float(f(jnp.asarray(1.0))) ** 2 for f in (sde.mean_coef, sde.std))
    v = alpha2 * variances + sigma2
    nats = 0.5 * np.sum(alpha2 * means**2 + v - 1 - np.log(v))
    density = sbml.Density(lambda x, t, key: -x, sde, (2, 2), levels=8, eps=EPS)
    found = density.bits_per_dim(k).prior_error
    np.testing.assert_allclose(found.mean, nats / (4 * math.log(2)), rtol=0.02)
    np.testing.assert_allclose(found.each, math.sqrt(2 * nats) / (4 * math.log(2)), rtol=0.02)
