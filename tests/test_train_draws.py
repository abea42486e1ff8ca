"""The random draws of a training step for a batch, and the loss that it computes from them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sbml.core.streams import stream
from sbml.losses import dsm_batch
from sbml.program.config import build, objective
from sbml.program.runtime import sharding


def variance_reducing():
    """The tiny config, shorter; antithetic pairs and a density of times are its default."""
    config = tiny.get_config()
    config.training.update(proposal_bins=8, num_steps=12, checkpoint_every=4)
    return config


@functools.cache
def reduced():
    """Its experiment, and the compiled function that makes the draws."""
    experiment = build.Experiment(variance_reducing())
    return experiment, jax.jit(objective.prepare_fn(experiment))


def plain_draws():
    """The tiny config without pairs and density."""
    config = tiny.get_config()
    config.training.update(noises="independent", proposal_bins=0)
    return config


def test_antithetic_pairs_are_one_image_and_time_with_opposite_noise():
    experiment, prepare = reduced()
    pixels = experiment.images("train").images[:32]
    draws = prepare(pixels, jax.random.key(0), np.zeros((2, 8), np.float32))
    keys, signs = np.asarray(jax.random.key_data(draws.keys)), np.asarray(draws.signs)
    assert draws.x.shape == (64, 8, 8, 1)
    for field in (*map(np.asarray, (draws.x, draws.t, draws.weight)), keys):
        np.testing.assert_array_equal(field[::2], field[1::2])
    np.testing.assert_array_equal(signs[::2], -signs[1::2])
    # No two images of a batch have the same noise, on whichever device they are, and no key of a
    # noise comes from the key of the dequantization.
    assert len(np.unique(keys, axis=0)) == 32
    other = jax.random.split(stream(jax.random.key(0), "dequantization"), 32)
    assert not set(map(tuple, keys.tolist())) & set(map(tuple, jax.random.key_data(other).tolist()))
    # Without statistics, the density of times is uniform.
    np.testing.assert_array_equal(draws.inverse, 1.0)
    statistics = np.float32([np.ones(8), np.arange(8)])
    dense = prepare(pixels, jax.random.key(0), statistics)
    assert np.asarray(dense.v).mean() > 0.55 and np.ptp(dense.inverse) > 0.5


@pytest.mark.slow
def test_antithetic_pairs_and_density_leave_the_expected_loss_as_it_is():
    """The mean losses with and without them agree, over many draws for the same images."""
    experiment, _ = reduced()
    plain = build.Experiment(plain_draws())
    pixels = jnp.asarray(experiment.images("train").images[:64])
    params = sharding.initial_state(plain.init_state, sharding.data_mesh()).params
    statistics = jnp.stack([jnp.ones(8), jnp.linspace(9.0, 0.1, 8)])
    means = []
    for e, s in ((plain, ()), (experiment, statistics)):
        prepare, loss = objective.prepare_fn(e), objective.loss_fn(e)
        one = jax.jit(lambda k, f=prepare, g=loss, s=s: g(params, f(pixels, k, s), ()).mean())
        means.append(np.array([one(jax.random.key(i)) for i in range(300)]))
    error = np.hypot(*(m.std() / np.sqrt(len(m)) for m in means))
    assert abs(means[0].mean() - means[1].mean()) < 4 * error < 0.1 * means[0].mean()


def test_statistics_are_those_of_the_pairs():
    experiment, prepare = reduced()
    pixels, zeros = experiment.images("train").images[:32], np.zeros((2, 8), np.float32)
    draws = prepare(pixels, jax.random.key(0), zeros)
    losses = np.arange(64, dtype=np.float32) ** 2
    counts, sums = jax.jit(objective.observe_fn(experiment))(zeros + 1, draws, losses)
    bins = np.floor(np.asarray(draws.v)[::2] * 8).astype(int)
    halves = 0.5 * (losses[::2] - losses[1::2]) ** 2
    np.testing.assert_allclose(counts, 0.99 + np.bincount(bins, minlength=8))
    np.testing.assert_allclose(sums, 0.99 + np.bincount(bins, halves, 8), rtol=1e-5)


def test_what_the_network_is_trained_on():
    """A pixel is spread over its bin, or is the bin's centre, or the authors' 2 k / (L - 1) - 1."""
    pixels = np.tile(np.arange(17, dtype=np.uint8), 40)

    @jax.jit
    def dequantized(pixels, key):
        kinds = ("uniform", "centre", "none")
        return {kind: objective.dequantize(pixels, key, kind, 17) for kind in kinds}

    made = jax.device_get(dequantized(pixels, jax.random.key(0)))
    k = np.asarray(pixels, np.float64)
    np.testing.assert_allclose(made["centre"], 2 * (k + 0.5) / 17 - 1, atol=1e-6)
    np.testing.assert_allclose(made["none"], 2 * k / 16 - 1, atol=1e-6)
    u = (made["uniform"] + 1) * 17 / 2 - k
    assert u.min() > -1e-5 and u.max() < 1 + 1e-5 and len(np.unique(made["uniform"])) > 600
    assert abs(u.mean() - 0.5) < 4 / np.sqrt(12 * len(u))


@pytest.mark.slow
def test_in_discrete_time_the_loss_is_that_of_the_levels():
    config = tiny.get_config()
    config.training.update(discrete_levels=25, noises="independent", proposal_bins=0)
    config.training.update(likelihood_weighting=False, importance_sampling=False)
    experiment = build.Experiment(config)
    params = experiment.adapter.init(jax.random.key(1), experiment.shape)
    params = jax.tree.map(lambda p: p + 0.1, params)  # The last layer begins at zero.
    pixels = jnp.asarray(experiment.images("train").images[:6])
    draws = jax.jit(objective.prepare_fn(experiment))(pixels, jax.random.key(0), ())
    level = draws.t * 24
    np.testing.assert_allclose(level, np.round(level), atol=1e-5)
    levels = experiment.sde.levels(25)
    score = dataclasses.replace(experiment.adapter, sde=levels, labels=experiment.sde)(params)
    how = {"weighting": "original"}
    expected = jax.jit(lambda d: dsm_batch(score, levels, d.x, d.t, d.keys, **how) / 64)(draws)
    found = jax.jit(objective.loss_fn(experiment))(params, draws, ())
    np.testing.assert_allclose(found, expected, rtol=1e-5)
