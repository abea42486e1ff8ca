"""The data with known scores and densities, which the other tests compare with, are right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from families import FAMILIES

from sbml.audit import oracle
from sbml.sdes import SDES

pytestmark = pytest.mark.usefixtures("x64")

X = np.random.default_rng(0).normal(size=(1, 3)) * 0.5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_score_is_the_gradient_of_the_log_density(name: str) -> None:
    times = jnp.asarray([1e-5, 0.1, 1.0])
    for data in (oracle.gaussian(SDES[name]()), oracle.mixture(SDES[name]())):
        score, gradient = (
            jax.jit(jax.vmap(f, (None, 0)))(jnp.asarray(X), times)
            for f in (data.score, jax.grad(data.logp))
        )
        np.testing.assert_allclose(score, gradient, rtol=1e-8)


def test_the_density_of_a_mixture_is_scipys() -> None:
    sde, t = SDES["vp"](), jnp.asarray(0.1)
    alpha, sigma = float(sde.mean_coef(t)), float(sde.std(t))
    density = 0.0
    for weight, seed in zip((0.5, 0.3, 0.2), (1, 2, 3), strict=True):
        part = oracle.gaussian(sde, 3, seed, 0.2)
        normal = scipy.stats.multivariate_normal(
            alpha * part.mean, alpha**2 * part.cov + sigma**2 * np.eye(3)
        )
        density += weight * normal.pdf(np.ravel(X))
    found = jax.jit(oracle.mixture(sde).logp)(jnp.asarray(X), t)
    np.testing.assert_allclose(found, np.log(density), rtol=1e-12)


def test_samples_and_linear_maps_of_a_mixture() -> None:
    data = oracle.mixture(SDES["vp"](), 2)
    weights, means = np.asarray(data.weights), np.asarray(data.parts.mean)
    parts = (np.asarray(a) for a in (data.parts.basis, data.parts.eigenvalues))
    covs = np.stack([(b * v) @ b.T for b, v in zip(*parts, strict=True)])
    x, mean = data.sample(0, 40_000), weights @ means
    np.testing.assert_allclose(x.mean(0), mean, atol=0.01)
    outer = means[:, :, None] * means[:, None]
    cov = np.einsum("k,kij->ij", weights, covs + outer) - np.outer(mean, mean)
    np.testing.assert_allclose(np.cov(x.T), cov, atol=0.01)
    matrix, shift = np.array([[2.0, 0.5], [0.0, 0.3]]), np.array([1.0, -1.0])
    found = data.affine(matrix, shift).log_prob(x[:5] @ matrix.T + shift)
    np.testing.assert_allclose(found, data.log_prob(x[:5]) - np.log(0.6), rtol=1e-6)


def test_the_tails_are_those_of_students_t() -> None:
    data, freedom = oracle.heavy_tails(SDES["vp"](), 1, 3.0, 400), 3.0
    x = np.linspace(-3, 3, 7)[:, None]
    t = scipy.stats.t(freedom, scale=np.sqrt(0.1)).logpdf(x[:, 0])
    np.testing.assert_allclose(data.log_prob(x), t, atol=0.02)


@pytest.mark.slow
def test_the_score_of_a_class_is_its_own() -> None:
    data, x, t = oracle.classes(SDES["vp"]()), jnp.asarray(X[0, :2]), jnp.asarray(0.1)
    for c in range(2):
        np.testing.assert_allclose(
            data.score(x, t, None, jnp.asarray(c)), jax.grad(data.of(c).logp)(x, t), rtol=1e-8
        )
    assert data.of(0).log_prob(X[:, :2]) != data.of(1).log_prob(X[:, :2])
