"""Samples by the ODE: the inverse of the likelihood's map, with the data's own moments."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from sbml.likelihood import Trace, ode_logp
from sbml.ode import Solver
from sbml.sampling import decode, denoise, ode_sample
from sbml.sdes import SDE, SDES
from sbml.types import Array

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
TIGHT = Solver(rtol=1e-8, atol=1e-8)
X = np.random.default_rng(0).normal(size=(4, 1, 3)) * 0.5


@pytest.fixture(params=SDES, name="sde")
def _sde(request: pytest.FixtureRequest) -> SDE:
    return SDES[request.param]()


@pytest.mark.oracle
def test_decoding_inverts_the_closed_form_latent(sde: SDE) -> None:
    data, x = oracle.gaussian(sde), jnp.asarray(X)
    z = jax.vmap(lambda x: data.flow(x, jnp.asarray(EPS), jnp.asarray(1.0)))(x)
    back, stats = jax.jit(
        jax.vmap(lambda z: decode(data.score, sde, z, eps=EPS, solver=TIGHT))
    )(z)
    np.testing.assert_allclose(back, x, atol=1e-5)
    assert np.all(stats.success)


@pytest.mark.oracle
def test_decoding_inverts_the_likelihoods_latent_of_a_mixture() -> None:
    sde = SDES["subvp"]()
    data = oracle.mixture(sde)

    def there_and_back(x: Array) -> Array:
        there = ode_logp(
            data.score, sde, x, None, eps=EPS, trace=Trace("exact"), solver=TIGHT
        )
        return decode(data.score, sde, there.z, eps=EPS, solver=TIGHT)[0]

    np.testing.assert_allclose(jax.jit(jax.vmap(there_and_back))(jnp.asarray(X)), X, atol=1e-5)


@pytest.mark.oracle
def test_samples_have_the_moments_of_the_data(sde: SDE) -> None:
    """Mean within 4 standard errors; each covariance entry too, of variance
    (c_ii c_jj + c_ij^2) / n for a Gaussian."""
    data, n = oracle.gaussian(sde), 4000
    keys = jax.random.split(jax.random.key(0), n)
    draw = jax.jit(jax.vmap(lambda key: ode_sample(data.score, sde, (1, 3), key, eps=EPS)[0]))
    samples = draw(keys)
    assert samples.shape == (n, 1, 3)
    samples = np.asarray(samples).reshape(n, 3)
    variances = np.diag(data.cov)
    assert np.all(np.abs(samples.mean(0) - data.mean) < 4 * np.sqrt(variances / n))
    spread = np.sqrt((np.outer(variances, variances) + data.cov**2) / n)
    assert np.all(np.abs(np.cov(samples.T) - data.cov) < 4 * spread)


@pytest.mark.oracle
def test_denoising_is_the_posterior_mean(sde: SDE) -> None:
    data, x = oracle.gaussian(sde), jnp.asarray(X[0])
    for t in (1e-3, 0.1, 1.0):
        estimate = denoise(data.score, sde, x, jnp.asarray(t))
        expected = data.posterior_mean(x, jnp.asarray(t))
        np.testing.assert_allclose(estimate, expected, atol=1e-8 * sde.prior_std)


def test_a_last_denoising_step_is_tweedies_at_eps() -> None:
    sde, eps = SDES["vp"](), 1e-2
    data, z = oracle.gaussian(sde), jnp.asarray(X[0])
    plain, _ = decode(data.score, sde, z, eps=eps)
    last, _ = decode(data.score, sde, z, eps=eps, denoise_last=True)
    np.testing.assert_allclose(last, data.posterior_mean(plain, jnp.asarray(eps)), atol=1e-10)
    assert np.abs(last - plain).max() > 1e-4


@pytest.mark.parametrize("eps", [0.0, -1.0, 1.0, 2.0, float("nan")])
def test_impossible_smallest_times_are_refused(eps: float) -> None:
    sde = SDES["vp"]()
    score = oracle.gaussian(sde).score
    with pytest.raises(ValueError, match="smallest time eps="):
        decode(score, sde, jnp.asarray(X[0]), eps=eps)
    with pytest.raises(ValueError, match="smallest time eps="):
        ode_sample(score, sde, (1, 3), jax.random.key(0), eps=eps)
