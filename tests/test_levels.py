"""The discrete-time losses of DDPM and SMLD, compared with the formulas in their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import losses, sdes
from sbml.core.streams import stream
from sbml.sdes import times

pytestmark = pytest.mark.usefixtures("x64")

N = 1000
DDPM, SMLD = sdes.VP().levels(N), sdes.VE().levels(N)


def test_ddpm_levels_are_the_products_of_its_betas() -> None:
    betas = np.linspace(1e-4, 0.02, N)  # Ho et al. 2020, section 4
    alphas_bar = np.cumprod(1 - betas)
    t = jnp.arange(N) / (N - 1)
    np.testing.assert_allclose(jax.vmap(DDPM.mean_coef)(t), np.sqrt(alphas_bar), rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(DDPM.std)(t), np.sqrt(1 - alphas_bar), rtol=1e-11)


def test_smld_levels_are_geometric_and_those_of_ve() -> None:
    t = jnp.arange(N) / (N - 1)
    stds = jax.vmap(SMLD.std)(t)
    np.testing.assert_allclose(stds[1:] / stds[:-1], 5000 ** (1 / (N - 1)), rtol=1e-12)
    np.testing.assert_allclose(stds, jax.vmap(sdes.VE().std)(t), rtol=1e-12)
    np.testing.assert_array_equal(jax.vmap(SMLD.mean_coef)(t), 1)


@pytest.mark.parametrize("n", [100, 400, 1600])
def test_ddpm_tends_to_vp(n: int) -> None:
    """Level i has seen i + 1 of n steps; the difference falls as 1 / n."""
    levels, i = sdes.VP().levels(n), np.arange(n)
    ours = jax.vmap(levels.mean_coef)(jnp.asarray(i / (n - 1)))
    assert np.abs(ours - sdes.VP().mean_coef((i + 1) / n)).max() < 4 / n


def test_the_time_of_a_level_survives_float32() -> None:
    t, weight = times.Grid(N).at(jnp.linspace(0, 1, N, endpoint=False, dtype=jnp.float32))
    found = jax.vmap(SMLD.std)(t)
    np.testing.assert_allclose(found, SMLD.stds, rtol=1e-6)
    np.testing.assert_array_equal(weight, 1)


def test_all_levels_are_equally_likely() -> None:
    u = times.lattice(jax.random.key(0), 5000)[:, 0]
    t, _ = times.Grid(50).at(u)
    np.testing.assert_array_equal(np.unique(np.round(t * 49), return_counts=True)[1], 100)


@pytest.mark.parametrize("levels", [DDPM, SMLD])
def test_the_loss_is_that_of_their_papers(levels: sdes.Levels) -> None:
    """DDPM: ||eps - eps_theta||^2; SMLD: sigma^2 ||s + (x_t - x) / sigma^2||^2. Ours is half."""
    x, t, key = jnp.asarray([0.3, -0.7, 0.1]), jnp.asarray(412 / (N - 1)), jax.random.key(3)
    z = jax.random.normal(stream(key, "noise"), x.shape, x.dtype)
    alpha, sigma = levels.mean_coefs[412], levels.stds[412]
    x_t = alpha * x + sigma * z
    loss = losses.dsm(lambda y, t, k: jnp.sin(y), levels, x, t, key, weighting="original")
    ddpm = 0.5 * np.sum((z - -sigma * np.sin(x_t)) ** 2)
    smld = 0.5 * sigma**2 * np.sum((np.sin(x_t) + (x_t - alpha * x) / sigma**2) ** 2)
    np.testing.assert_allclose(loss, ddpm, rtol=1e-12)
    np.testing.assert_allclose(loss, smld, rtol=1e-10)
