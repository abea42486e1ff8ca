"""The error that the prior in place of p_T leaves in an exact score's log p_eps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml.likelihood import Trace, ode_logp
from sbml.ode import Solver
from sbml.sdes import SDES
from sbml.verify import oracle

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-3
MEAN, VARIANCES = np.array([0.8, -0.6]), np.array([0.5, 0.02])


@pytest.mark.parametrize(("name", "one"), [("vp", 0.007), ("ve", 0.02), ("linear_gamma", 0.08)])
def test_the_error_of_an_exact_score_is_the_priors(name: str, one: float) -> None:
    """Of each example log pi(z) - log p_T(z), about alpha / s; in the mean -KL(p_T || pi).

    Over the points m +- sqrt(d) sigma_i e_i of p_eps a quadratic has its mean over p_eps.
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
