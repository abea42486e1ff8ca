"""Every kind of prediction gives the score of Gaussians and mixtures, and their likelihood."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sbml import bound, likelihood, predictions, times
from sbml.divergence import Trace
from sbml.predictions import KINDS, from_prediction
from sbml.sdes import SDE, SDES
from sbml.types import Array
from sbml.verify import oracle

pytestmark = pytest.mark.usefixtures("x64")

EPS = 1e-3


def exact(
    kind: str, sde: SDE, score: Callable[[Array, Array], Array], d: float
) -> predictions.Network:
    """What an ideal network predicts, by the definition of ``kind`` and Tweedie's formula."""

    def both(x: Array, t: Array) -> tuple[Array, Array]:
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        return (x + sigma**2 * score(x, t)) / alpha, -sigma * score(x, t)

    def network(x: Array, t: Array) -> Array:
        alpha, sigma = sde.mean_coef(t), sde.std(t)
        x0, noise = both(x, t)
        return {
            "noise": noise,
            "score": score(x, t),
            "x0": x0,
            "velocity": alpha * noise - sigma * x0,
            "flow": noise - x0,
        }[kind]

    def edm(scaled: Array, label: Array) -> Array:
        """(D(y) - c_skip y) / c_out, in the numbers of EDM's table 1."""
        rho = jnp.exp(4 * label)
        t = sde.time(-2 * jnp.log(rho))
        y = scaled * jnp.sqrt(rho**2 + d**2)
        x0, _ = both(sde.mean_coef(t) * y, t)
        c_skip, c_out = d**2 / (rho**2 + d**2), rho * d / jnp.sqrt(rho**2 + d**2)
        return (x0 - c_skip * y) / c_out

    return edm if kind == "edm" else network


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_is_the_same_score(kind: str, name: str) -> None:
    sde = SDES[name]()
    truth = oracle.gaussian(sde)
    found = from_prediction(exact(kind, sde, truth.score, 0.7), kind, sde, data_std=0.7)
    for t in (EPS, 0.1, 0.5, 0.999):
        t = jnp.asarray(t)
        x = sde.mean_coef(t) * jnp.array([0.4, -0.3, 0.2]) + sde.std(t) * jnp.array(
            [1.0, -2.0, 0.5]
        )
        expected = truth.score(x, t)
        scale = jnp.abs(expected).max()
        np.testing.assert_allclose(found(x, t, None), expected, rtol=1e-8, atol=1e-8 * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_and_bound_are_those_of_the_mixture(kind: str) -> None:
    sde = SDES["vp"]()
    truth = oracle.mixture(sde)
    score = from_prediction(exact(kind, sde, truth.score, 0.5), kind, sde)
    x, key = jnp.array([0.4, 0.0, 0.1]), jax.random.key(0)
    options = {"eps": EPS, "trace": Trace("exact")}

    @jax.jit
    def numbers(x: Array) -> tuple[Array, Array]:
        logp = likelihood.ode_logp(score, sde, x, None, **options).logp
        u = times.lattice(key, 1, 64)[0]
        return logp, bound.elbo(score, sde, x, key, eps=EPS, u=u).total

    logp, total = numbers(x)
    assert float(logp) == pytest.approx(float(truth.logp(x, jnp.asarray(EPS))), abs=5e-3)
    reference = bound.elbo(truth.score, sde, x, key, eps=EPS, u=times.lattice(key, 1, 64)[0]).total
    assert float(total) == pytest.approx(float(reference), abs=1e-7)


def test_a_network_of_batches_is_called_with_one() -> None:
    sde, x, t = SDES["vp"](), jnp.ones((2, 2)), jnp.asarray(0.3)
    one = from_prediction(lambda x, t: t * x, "noise", sde)
    many = from_prediction(lambda x, t: t[:, None, None] * x, "noise", sde, batched=True)
    np.testing.assert_allclose(one(x, t), many(x, t), rtol=1e-12)


def test_what_cannot_be_is_refused() -> None:
    sde = SDES["vp"]()
    with pytest.raises(ValueError, match="unknown prediction 'v'; choose from noise, score, x0"):
        from_prediction(lambda x, t: x, "v", sde)
    with pytest.raises(ValueError, match="data_std=0.0"):
        from_prediction(lambda x, t: x, "edm", sde, data_std=0.0)
    with pytest.raises(ValueError, match=r"shape \(\) for an input of \(2,\)"):
        from_prediction(lambda x, t: t, "noise", sde)(jnp.ones(2), jnp.asarray(0.5))
