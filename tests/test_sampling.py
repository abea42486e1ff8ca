"""Samples by the ODE: the closed-form map of a Gaussian from latents to data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES

from sbml.audit import oracle
from sbml.core.types import Array
from sbml.likelihood.ode import Solver
from sbml.samplers import decode, denoise, ode_sample
from sbml.sdes import SDES

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-5
TIGHT = Solver(rtol=1e-8, atol=1e-8)
SHAPE, N = (1, 3), 16
X = np.random.default_rng(0).normal(size=(4, *SHAPE)) * 0.5


@functools.cache
def decode_latents(name: str) -> tuple[Array, Array]:
    """Latents ``(N, *SHAPE)`` from the prior, and their samples ``(N, *SHAPE)``."""
    sde = SDES[name]()
    data, keys = oracle.gaussian(sde), jax.random.split(jax.random.key(0), N)
    z = jax.vmap(lambda key: sde.prior_sample(key, SHAPE))(keys)
    decode_all = jax.vmap(lambda z: decode(data.score, sde, z, eps=EPS, solver=TIGHT))
    samples, stats = jax.jit(decode_all)(z)
    assert np.all(stats.success)
    return z, samples


@pytest.mark.slow
@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_a_gaussian_is_its_closed_form_map(name: str) -> None:
    (z, samples), sde = decode_latents(name), SDES[name]()
    flow = jax.jit(jax.vmap(oracle.gaussian(sde).flow, (0, None, None)))
    last = jnp.asarray(sde.largest_time)
    start = z * sde.std(last) / sde.std(jnp.asarray(1.0))
    np.testing.assert_allclose(samples, flow(start, last, EPS), atol=1e-5)


@pytest.mark.slow
def test_a_sample_is_a_decoded_prior_draw() -> None:
    """Two keys give two samples, each from its own latent."""
    sde = SDES["vp"]()
    data, keys = oracle.gaussian(sde), jax.random.split(jax.random.key(0), N)[:2]
    draw = jax.vmap(lambda key: ode_sample(data.score, sde, SHAPE, key, eps=EPS, solver=TIGHT))
    samples, stats = jax.jit(draw)(keys)
    np.testing.assert_allclose(samples, decode_latents("vp")[1][:2], atol=1e-6)
    assert np.all(stats.success)


@pytest.mark.oracle
@pytest.mark.parametrize("name", FAMILIES)
def test_denoising_is_the_posterior_mean(name: str) -> None:
    sde, x = SDES[name](), jnp.asarray(X[0])
    data, t = oracle.gaussian(sde), jnp.asarray([1e-3, 0.1, sde.largest_time])
    estimate = jax.jit(jax.vmap(lambda t: denoise(data.score, sde, x, t)))(t)
    expected = jax.jit(jax.vmap(lambda t: data.posterior_mean(x, t)))(t)
    np.testing.assert_allclose(estimate, expected, atol=1e-8 * sde.prior_std)


def test_the_last_denoising_step_is_the_posterior_mean_at_eps() -> None:
    sde, eps, z = SDES["vp"](), 1e-2, jnp.asarray(X[0])
    data = oracle.gaussian(sde)
    last, _ = jax.jit(
        lambda z: decode(data.score, sde, z, eps=eps, solver=TIGHT, denoise_last=True)
    )(z)
    plain = data.flow(z, jnp.asarray(1.0), jnp.asarray(eps))
    np.testing.assert_allclose(last, data.posterior_mean(plain, jnp.asarray(eps)), atol=1e-6)
    assert np.abs(last - plain).max() > 1e-4
