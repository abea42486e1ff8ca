"""A learned noise schedule: training moves its ends to where the whole bound is smallest."""

import dataclasses
import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from sbml import losses
from sbml.core import bits
from sbml.core.platform import compiler_options
from sbml.likelihood import bound, discrete
from sbml.program.config import build, objective
from sbml.program.modes import eval as evaluate
from sbml.program.modes import sample, train
from sbml.program.runtime.state import mean
from sbml.sdes import SDES, times

VARIANCE = 0.3
NUMBERS = ("gamma_0", "gamma_1")


def numbers(params):
    """The numbers of the SDE among the parameters."""
    return {name: float(value) for name, value in params["sde"].items()}


def learned(**training):
    """The tiny config with VDM's schedule, whose two ends are learned."""
    config = tiny.get_config()
    config.sde.update(name="linear_gamma", learned=True)
    config.data.dequantization = "centre"
    config.score.update(parameterization="noise", label="scaled_log_snr")
    config.training.update(**training)
    config.eval.update(estimators=("bound",), dequantizers=("categorical",), tau=0.0)
    config.eval.bound.sweeps = 1
    return config


# These functions are called thousands of times, so optimized code saves more time than it costs.
jit = functools.partial(jax.jit, compiler_options=compiler_options())


class Gaussian(nn.Module):
    """The exact noise prediction for N(0, VARIANCE) plus 0.05, an error at every noise level."""

    @nn.compact
    def __call__(self, x, label, *, train):
        log_snr = (13.3 - label * 18.3 / 1000)[:, None, None, None]
        alpha2, variance = jax.nn.sigmoid(log_snr), jax.nn.sigmoid(-log_snr)
        return jnp.sqrt(variance) * x / (alpha2 * VARIANCE + variance) + 0.05


@pytest.fixture(scope="module")
def gaussian():
    """An experiment with this network, and images of N(0, VARIANCE) rounded to 17 levels."""
    experiment = build.Experiment(learned(noises="independent", proposal_bins=0))
    replaced = dataclasses.replace(experiment.adapter, model=Gaussian())
    experiment.adapter = experiment.trained_adapter = replaced
    x = VARIANCE**0.5 * np.random.default_rng(0).normal(size=(512, 8, 8, 1))
    pixels = np.clip(np.floor((x + 1) * 17 / 2), 0, 16).astype(np.uint8)
    return experiment, jnp.asarray(pixels)


def bound_of(experiment, pixels, ends):
    """The mean of ``discrete.elbo`` in nats/dim for VDM's schedule with ``ends``, and its standard
    error."""
    keys = jax.random.split(jax.random.key(5), len(pixels))
    u = times.lattice(jax.random.key(6), len(pixels), 8)
    values = np.asarray(_bounds(experiment.adapter, pixels, keys, u, jnp.asarray(ends))) / 64
    return values.mean(), values.std() / np.sqrt(len(values))


@functools.partial(jit, static_argnums=0)
def _bounds(adapter, pixels, keys, u, ends):
    sde, noise = SDES["linear_gamma"](*ends), discrete.Categorical(17)
    score = dataclasses.replace(adapter, sde=sde)({})

    def one(pixels, key, u):
        return discrete.elbo(score, sde, pixels, key, eps=0.0, u=u, noise=noise).total

    return jax.vmap(one)(pixels, keys, u)


def trained_ends(experiment, pixels, starts):
    """The ends that gradient descent on the training's loss reaches from each start. All steps have
    the same draws."""
    prepare, loss = objective.prepare_fn(experiment), objective.loss_fn(experiment)
    draws = [prepare(pixels, jax.random.key(i), ()) for i in range(12)]

    @jit
    def step(ends, draws):
        def total(ends):
            params = {"sde": dict(zip(NUMBERS, ends, strict=True))}
            return mean(loss(params, draws, ()))

        return jax.grad(total)(ends)

    found = []
    for start in starts:
        ends = jnp.asarray(start)
        for _ in range(14):  # The curvatures are about 0.009 and 0.0025.
            ends -= 100 * jnp.mean(jnp.stack([step(ends, d) for d in draws]), axis=0)
        found.append(np.asarray(ends))
    return found


@pytest.mark.slow
@pytest.mark.oracle
def test_the_loss_is_the_bound(gaussian):
    """For any ends, the mean of the training's loss over draws is the bound of an evaluation."""
    experiment, pixels = gaussian
    prepare, loss = objective.prepare_fn(experiment), objective.loss_fn(experiment)

    @jit
    def one(key, params):
        return mean(loss(params, prepare(pixels, key, ()), ()))

    for ends in ((-6.0, 2.0), (-2.0, 1.0)):
        params = {"sde": dict(zip(NUMBERS, ends, strict=True))}
        values = np.asarray([one(jax.random.key(i), params) for i in range(100)])
        expected, error = bound_of(experiment, pixels, ends)
        assert abs(values.mean() - expected) < 4 * np.hypot(error, values.std() / 10) < 0.05


@pytest.mark.slow
@pytest.mark.oracle
def test_the_gradient_finds_the_ends_that_a_scan_finds(gaussian):
    """The scan evaluates the bound, with other draws than training, at nine values of each end."""
    experiment, pixels = gaussian
    found, again = trained_ends(experiment, pixels, [(-5.0, 3.0), (-2.2, 2.0)])
    np.testing.assert_allclose(again, found, atol=0.1)
    for k in range(2):
        grid = found[k] + np.linspace(-1.5, 1.5, 9)
        ends = [[*found[:k], g, *found[k + 1 :]] for g in grid]
        values = np.asarray([bound_of(experiment, pixels, e)[0] for e in ends])
        fine = np.linspace(grid[0], grid[-1], 1001)
        best = fine[np.argmin(np.polynomial.Polynomial.fit(grid, values, 4)(fine))]
        assert abs(found[k] - best) < 0.3
        assert min(values[0], values[-1]) > values.min() + 5e-4


@pytest.mark.parametrize("noises", ["independent", "antithetic"])
def test_the_density_of_the_times_ignores_the_terms_at_the_ends(gaussian, noises):
    """Its bins get the loss at the drawn times without the terms at both ends, for any density."""
    experiment = build.Experiment(learned(noises=noises, proposal_bins=8))
    experiment.adapter = gaussian[0].adapter
    empty, uneven = np.zeros((2, 8)), np.stack([np.ones(8), 4.0 ** np.arange(8)])
    prepare, loss, observe = (
        f(experiment) for f in (objective.prepare_fn, objective.loss_fn, objective.observe_fn)
    )

    @jax.jit
    def statistics(params, pixels, key):
        draws = prepare(pixels, key, jnp.asarray(uneven))
        score, sde = experiment.trained_score(params)
        batch = draws.x, draws.t, draws.keys
        values = draws.weight * losses.dsm_batch(score, sde, *batch, signs=draws.signs) / 64
        v = draws.v
        if noises == "antithetic":
            values, v = 0.5 * (values[::2] - values[1::2]) ** 2, v[::2]
        expected = times.tally(empty, v, values, 0.99)
        return observe(empty, draws, loss(params, draws, ())), expected

    params = {"sde": {"gamma_0": -6.0, "gamma_1": 2.0}}
    found, expected = statistics(params, np.asarray(gaussian[1])[:64], jax.random.key(0))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.slow
def test_a_run_is_evaluated_with_the_ends_it_learned(tmp_path):
    """The ends are the averages in the checkpoint. The config only says where they began."""
    config = learned(num_steps=30, checkpoint_every=30)
    config.optim.update(lr=0.03, warmup=1)
    config.eval.max_images = 16
    config.eval.bound.update(control=False, proposal_bins=0)
    config.sampling.sampler.update(name="ddim", steps=2)
    runs.mode(train.run, config, tmp_path)
    experiment = build.Experiment(config)
    restored = experiment.restore(tmp_path)
    average = restored.state.ema_params
    ends = numbers(average)
    assert set(ends) == set(NUMBERS)
    assert abs(ends["gamma_0"] + 13.3) > 0.05 and abs(ends["gamma_1"] - 5.0) > 0.05
    now = experiment.with_learned_schedule(average)
    assert now.sde == SDES["linear_gamma"](**ends) == now.exact_adapter.sde
    runs.mode(evaluate.run, config, tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    shown = {name: evaluation["config"]["sde"][name] for name in NUMBERS}
    assert shown == pytest.approx(ends, abs=1e-7)
    # The prior term of the evaluation is that of the learned end.
    columns = np.load(tmp_path / "per_image.npz")
    x = bits.to_model(jnp.asarray(experiment.images("test").images[columns["id"]]), 0.5, 17)
    prior = jax.vmap(lambda x: bound.prior_kl(now.sde, x))(x) / 64 / np.log(2)
    (name,) = [n for n in columns if n.endswith("prior")]
    np.testing.assert_allclose(columns[name], prior, rtol=1e-4)
    runs.mode(sample.run, config, tmp_path)
    config.training.num_steps = 31
    runs.mode(train.run, config, tmp_path)  # The training continues from the learned ends.
    after = build.Experiment(config).restore(tmp_path).state.params
    before = numbers(restored.state.params)
    for name, value in numbers(after).items():
        assert 0 < abs(value - before[name]) < 0.1


def test_a_time_has_the_label_of_the_training_when_the_ends_have_moved():
    """The label is 0 at the smallest time of training, even if the learned numbers give another
    smallest time."""
    config = learned()
    config.sde.name, config.score.label, config.eval.tau = "vp", "log_snr", 3.0
    experiment = build.Experiment(config)
    params = {"sde": {"beta_min": jnp.asarray(0.2), "beta_max": jnp.asarray(15.0)}}
    score, sde = experiment.trained_score(params)
    now = experiment.with_learned_schedule(params)
    config.sde.update(beta_min=0.2, beta_max=15.0)
    adapters = now.adapter, score.how, build.Experiment(config).adapter
    t = np.float32([0.01, 0.1, 0.5, 1.0])
    label, expected, moved = jax.jit(lambda t: [a.time_label(t) for a in adapters])(t)
    np.testing.assert_allclose(label, expected, rtol=1e-6)
    assert np.abs(moved - expected).min() > 0.1
    assert now.eval_eps == experiment.eval_eps == experiment.adapter.eps


def test_a_schedule_that_is_not_learned_is_no_parameter():
    config = learned()
    config.sde.learned = False
    experiment = build.Experiment(config)
    init = experiment.adapter.init
    params = jax.eval_shape(lambda key: init(key, experiment.shape), jax.random.key(0))
    assert "sde" not in params and experiment.with_learned_schedule(params) is experiment
