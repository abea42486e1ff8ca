"""Bijections of distrax and flowjax as changes of variables, and the documentation's examples with
libraries that the other tests do not need; ``.ci/frameworks`` runs them."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_docs
from scipy import stats

import sbml

pytestmark = pytest.mark.frameworks

MEAN, STD = 1.0, np.array([0.5, 0.7, 1.2])
Y = np.exp(MEAN + STD * np.random.default_rng(0).normal(size=(5, 3))).astype(np.float32)


def _of_distrax():
    import distrax

    return distrax.Chain([distrax.Lambda(jnp.exp), distrax.ScalarAffine(MEAN, jnp.asarray(STD))])


def _of_distrax_block():
    import distrax

    return distrax.Block(_of_distrax(), ndims=1)


def _of_flowjax():
    from flowjax import bijections

    affine = bijections.Affine(jnp.full(3, MEAN), jnp.asarray(STD))
    return bijections.Chain([affine, bijections.Exp((3,))])


@pytest.mark.parametrize("bijection", [_of_distrax, _of_distrax_block, _of_flowjax])
def test_log_p_samples_and_gradient_of_lognormal_data(bijection) -> None:
    d = sbml.Density(lambda x, t, key: -x, sbml.VP(), shape=(3,), transform=bijection())
    lognormal = stats.lognorm(s=STD, scale=np.exp(MEAN))
    truth = lognormal.logpdf(Y.astype(float)).sum(axis=1)
    np.testing.assert_allclose(d.log_prob(Y), truth, atol=1e-5)
    np.testing.assert_allclose(d.logp(Y).values, truth, atol=1e-5)
    y, logp = d.sample_and_log_prob(jax.random.key(0), 4)
    np.testing.assert_allclose(logp, lognormal.logpdf(np.asarray(y, float)).sum(axis=1), atol=1e-4)
    gradient = jax.grad(lambda y: d.log_prob(y).sum())(jnp.asarray(Y))
    expected = -(1 + (np.log(Y) - MEAN) / STD**2) / Y
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "block", test_docs.NEEDS_OTHERS, ids=lambda block: f"{block[0]}:{block[1]}"
)
def test_a_block_of_the_documentation_prints_the_truth(block, capsys) -> None:
    """The comment names it; the error of the chains' means is about 0.05."""
    test_docs.execute(*block)
    truth = re.findall(r"-?\d+\.?\d*", block[2].rpartition("# the truth: ")[2])
    printed = np.array(capsys.readouterr().out.strip("[]\n").split(), float)
    np.testing.assert_allclose(printed, np.array(truth, float), atol=0.2)
