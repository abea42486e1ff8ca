"""Two updates of the training: how rows are split over a step, the average and the warm-up."""

import jax
import numpy as np
import pytest
import runs
import tiny

from sbml.program.config import build, objective
from sbml.program.modes import train
from sbml.program.runtime import sharding


def one_step(**training):
    """State and metrics of two updates from the start, with ``training`` fields overridden."""
    config = tiny.get_config()
    config.training.update(training)
    experiment, mesh = build.Experiment(config), sharding.data_mesh()
    pixels = experiment.images("train").images[:64].reshape(2, 32, 8, 8, 1)
    state, key = sharding.initial_state(experiment.init_state, mesh), jax.random.key(0)
    dispatch = config.training.steps_per_dispatch
    step = sharding.compiled_step(
        objective.update(experiment), mesh, state, steps_per_dispatch=dispatch
    )
    if dispatch == 2:
        return step(state, pixels, key, ())
    state, first = step(state, pixels[0], key, ())
    state, second = step(state, pixels[1], key, ())
    return state, jax.tree.map(lambda *a: np.stack(a), first, second)


@pytest.fixture(scope="module")
def plain_step():
    return one_step()


@pytest.mark.slow
@pytest.mark.parametrize("option", [{"accumulate": 4}, {"steps_per_dispatch": 2}], ids=str)
def test_accumulation_and_dispatch_change_nothing(plain_step, option):
    for expected, got in zip(plain_step, one_step(**option), strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-3, 1e-6), expected, got)


def test_average_is_exponential_and_warmup_starts_at_zero(plain_step):
    """The first learning rate is 0, the second 1/10 of the peak; ema = .9 ema + .1 params."""
    config = tiny.get_config()
    fresh = sharding.initial_state(build.Experiment(config).init_state, sharding.data_mesh())
    state, _ = plain_step
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), fresh.params, state.params)
    # One Adam step moves each parameter by at most the learning rate, 1e-4 here.
    assert 0.5e-4 < max(jax.tree.leaves(moved)) < 1.01e-4
    expected = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, fresh.params, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-7), expected,
                 state.ema_params)  # fmt: skip


def test_a_batch_that_does_not_divide_names_each_factor(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = tiny.get_config()
    config.training.update(batch_size=30, accumulate=4)
    message = (
        r"training.batch_size=30 .* 8 = 1 devices x 4 training.accumulate x 2 rows .* 24 or 32"
    )
    with pytest.raises(ValueError, match=message):
        runs.mode(train.run, config, tmp_path)
