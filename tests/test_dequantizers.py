"""The contract of every dequantizer, and the truncated normal compared with scipy's."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy import integrate, stats

from sbml import dequantizers
from sbml.dequantizers import truncated_normal
from sbml.likelihood import discrete

pytestmark = pytest.mark.usefixtures("small_designs")
SHAPE, DRAWS = (2, 2, 1), 4096
# Small sizes, for models that have these fields.
SMALL = {
    "design": "small cifar10",
    "filters": 4,
    "components": 2,
    "blocks": 1,
    "heads": 1,
    "levels": 17,
}


DENSITIES = [n for n, kind in dequantizers.DEQUANTIZERS.items() if dequantizers.has_density(kind)]


@pytest.fixture(scope="module", params=DENSITIES)
def drawn(request):
    """u (n, *s) and log q (n,) of one image, by one compiled call, and the model."""
    kind = dequantizers.DEQUANTIZERS[request.param]
    fields = {f.name for f in dataclasses.fields(kind)}
    model = kind(**{k: v for k, v in SMALL.items() if k in fields})
    pixels = np.arange(4, dtype=np.uint8).reshape(SHAPE)
    # The rbg generator compiles in half the time of the default one.
    key = jax.random.key(0, impl="rbg")
    params = jax.jit(model.init)(key, np.stack([pixels] * 8))
    keys = jax.random.split(jax.random.key(1), DRAWS)
    draw = jax.jit(jax.vmap(lambda key: model.sample(params, pixels, key)))
    return model, draw, keys, draw(keys)


@pytest.mark.slow
def test_u_stays_in_the_bin(drawn):
    u, log_q = drawn[3]
    assert u.shape == (DRAWS, *SHAPE) and log_q.shape == (DRAWS,)
    assert u.min() >= 0 and u.max() < 1 and np.isfinite(log_q).all()


@pytest.mark.slow
def test_draws_are_a_function_of_the_key(drawn):
    _, draw, keys, (u, log_q) = drawn
    again, log_q_again = draw(keys[::-1])
    np.testing.assert_allclose(again[::-1], u, atol=1e-6)
    np.testing.assert_allclose(log_q_again[::-1], log_q, atol=1e-4)
    assert len(np.unique(np.asarray(u).reshape(DRAWS, -1)[:, 0])) > 0.9 * DRAWS


@pytest.mark.slow
def test_log_q_is_a_normalised_density(drawn):
    """E_q [1 / q; u in a box] is the volume of the box. The box leaves out the edges of the bin,
    where 1 / q is unbounded."""
    u, log_q = (np.asarray(a, np.float64) for a in drawn[3])
    inside = np.all((u > 0.1) & (u < 0.9), axis=(1, 2, 3))
    inverse = np.where(inside, np.exp(-log_q), 0.0)
    error = inverse.std() / np.sqrt(DRAWS)
    assert error < 0.05
    assert abs(inverse.mean() - 0.8**4) < 4 * error


@pytest.mark.parametrize("name", dequantizers.DEQUANTIZERS)
def test_models_are_hashable_and_say_what_they_are(name):
    kind = dequantizers.DEQUANTIZERS[name]
    model = kind(**{f.name: SMALL[f.name] for f in dataclasses.fields(kind) if f.name in SMALL})
    assert hash(model) == hash(dataclasses.replace(model))
    assert model.at_noise in (True, False)
    assert dequantizers.has_density(model) or dequantizers.has_bound(model)
    # Here, those that act on the noisy image (``at_noise``) are those with a bound.
    assert dequantizers.has_bound(model) == model.at_noise


@pytest.mark.parametrize("tau", [0.5, 3.0])
def test_truncated_normal_is_scipys(tau):
    """Three comparisons: the samples by a Kolmogorov-Smirnov test, the density at each sample, and
    the mean of log q."""
    model = truncated_normal.Model(tau)
    keys = jax.random.split(jax.random.key(0), 20_000)
    pixels = np.zeros((1,), np.uint8)
    draw = jax.jit(jax.vmap(lambda key: model.sample({}, pixels, key)))
    u, log_q = map(np.asarray, draw(keys))
    u = u[:, 0].astype(np.float64)
    truth = stats.truncnorm(-tau, tau, loc=0.5, scale=1 / (2 * tau))
    assert stats.kstest(u, truth.cdf).pvalue > 1e-3
    np.testing.assert_allclose(log_q, truth.logpdf(u), atol=2e-5)
    negative_entropy = integrate.quad(lambda v: truth.pdf(v) * truth.logpdf(v), 0, 1)[0]
    assert negative_entropy == pytest.approx(-truth.entropy(), abs=1e-8)
    assert log_q.mean() == pytest.approx(negative_entropy, abs=4 * float(log_q.std()) / 141)


def test_truncation_keeps_order_and_symmetry():
    e = np.linspace(-6, 6, 1001, dtype=np.float32)
    kept = np.asarray(jax.jit(lambda e: discrete.truncated_normal(e, 3.0))(e))
    assert np.all(np.diff(kept) >= 0) and np.abs(kept).max() <= 3
    np.testing.assert_allclose(kept, -kept[::-1], atol=1e-6)
    np.testing.assert_allclose(kept[400:601], e[400:601], atol=2e-3 * 3)


@pytest.mark.parametrize("levels", [17, 256])
def test_three_deviations_fill_half_a_bin(levels):
    rho = np.exp(-0.5 * discrete.bin_log_snr(levels))
    assert 3 * rho == pytest.approx(1 / levels)
