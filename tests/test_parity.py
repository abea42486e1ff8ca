"""The numbers of Song et al.'s own code, from their own checkpoint (``reference``).

Their draws are not ours, so a mean of theirs is compared within the noise of both. Random weights
make the ODE ill-conditioned: SciPy's RK45 in float64 at 1e-8 ends up to 6.4e-3 from their latents,
which RK45 found in float32 at 1e-6, and at 1e-5 it ends 0.15 away. So the latents of two codes
agree to about a hundredth here, however right both are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from sbml import likelihood, sdes
from sbml.core import bits
from sbml.core.platform import compiler_options
from sbml.likelihood import bound
from sbml.likelihood.ode import Solver
from sbml.networks import ncsnpp
from sbml.score import Adapter

SDE = sdes.VP()
LEVELS = 256
GIVEN = reference.load()
score_of = Adapter(ncsnpp.Model(**reference.OPTIONS), SDE)
SCORE = score_of(GIVEN.params)
EPS = float(GIVEN.ode_eps)


@pytest.mark.slow
def test_score_is_theirs() -> None:
    """Theirs divides by sqrt(B), not sqrt(1 - exp(-B)), where B is at most 2e-3."""
    t = jnp.asarray(GIVEN.t)
    b = -2 * np.log(np.asarray(SDE.mean_coef(t), np.float64))
    assert (b <= 2e-3).any() and (b > 2e-3).any()
    theirs = np.where(b <= 2e-3, np.sqrt(b / -np.expm1(-b)), 1)  # their divisor over ours
    scores = np.asarray(SCORE.batch(GIVEN.x, t, None)) / theirs[:, None, None, None]
    for ours, given in zip(scores, GIVEN.score, strict=True):
        np.testing.assert_allclose(ours, given, rtol=0, atol=1e-5 * max(1, np.abs(given).max()))


def within_noise(ours: np.ndarray, theirs: np.ndarray, draws: int) -> None:
    """Compare ``ours (n,)``, means of ``draws`` draws, with ``theirs``, where each row is a draw.
    Each image is compared, and the mean over the images."""
    scatter = theirs.std(axis=0, ddof=1) * np.sqrt(1 / draws + 1 / len(theirs))
    assert (np.abs(ours - theirs.mean(axis=0)) < 3 * scatter).all(), (ours, theirs, scatter)
    of_mean = np.sqrt(np.sum(scatter**2)) / len(ours)
    assert np.abs(ours.mean() - theirs.mean()) < 3 * of_mean, (ours, theirs, of_mean)


@pytest.mark.slow
def test_ode_latents_and_bits() -> None:
    solver = Solver(rtol=1e-6, atol=1e-6)

    @functools.partial(jax.jit, compiler_options=compiler_options())
    @functools.partial(jax.vmap, in_axes=(None, 0, 0))
    def solve(params: Any, x: jax.Array, key: jax.Array) -> likelihood.Likelihood:
        return likelihood.ode_logp(score_of(params), SDE, x, key, eps=EPS, solver=solver)

    images = GIVEN.image[:1]  # An image takes ten seconds.
    result = solve(GIVEN.params, images, jax.random.split(jax.random.key(0), len(images)))
    np.testing.assert_allclose(result.z, GIVEN.ode_z[: len(images)], atol=0.03)
    nll = bits.bits_per_dim(-result.logp, images.shape[1:], LEVELS)
    within_noise(np.asarray(nll), GIVEN.ode_bpd[:, : len(images)], draws=1)


@pytest.mark.slow
def test_bound_bits() -> None:
    def one(x: jax.Array, key: jax.Array) -> jax.Array:
        u = jax.random.uniform(jax.random.fold_in(key, 1), (200,))
        return bound.elbo(SCORE, SDE, x, key, eps=EPS, u=u).total

    nll = jax.jit(jax.vmap(one))(GIVEN.image, jax.random.split(jax.random.key(0), 4))
    ours = bits.bits_per_dim(nll, GIVEN.image.shape[1:], LEVELS)
    within_noise(np.asarray(ours), GIVEN.bound_bpd, draws=1)
