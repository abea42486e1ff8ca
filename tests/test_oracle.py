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
