"""A dequantizer trained against a frozen score: its loss is the bound that evaluation reports."""

import dataclasses
import json
import math
import shutil
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny
from ml_collections import ConfigDict

from sbml import data
from sbml.core.streams import stream
from sbml.dequantizers import Dequantizer, variational
from sbml.likelihood import bound
from sbml.program.config import build
from sbml.program.modes import eval as evaluate
from sbml.program.modes import train, train_dequantizer
from sbml.program.runtime import metrics, sharding

STEPS = 12


@pytest.fixture(scope="module", autouse=True)
def least_design():
    """The design "least" of Flow++ with one coupling: a training compiles its gradient."""
    with pytest.MonkeyPatch.context() as patch:
        fewer = variational.DESIGNS["cifar10"]._replace(couplings=1, context_blocks=1)
        patch.setitem(variational.DESIGNS, "least", fewer)
        yield


def config_of(**training):
    config = tiny.get_config()
    config.dequantizer.model.update(design="least", filters=8, components=2, blocks=1, heads=2)
    config.dequantizer.training.update(
        batch_size=64, num_steps=STEPS, log_every=1, checkpoint_every=4, keep_every=0
    )
    config.dequantizer.training.update(training)
    config.dequantizer.optim.update(lr=3e-3, warmup=4)
    return config


@pytest.fixture(scope="module")
def score(digits_model, tmp_path_factory):
    """A work directory with a score."""
    workdir = tmp_path_factory.mktemp("score")
    (workdir / "checkpoints").symlink_to(digits_model / "checkpoints")
    return workdir


@pytest.fixture(scope="module")
def whole(score):
    runs.mode(train_dequantizer.run, config_of(), score)
    return score


def state(workdir):
    experiment = build.Experiment(config_of())
    return experiment.restore_dequantizer(workdir, experiment.images("train")).state


@pytest.mark.slow
def test_resumed_training_is_the_uninterrupted_one(whole, tmp_path):
    """The run goes on from what the uninterrupted one left on disk after step 8, to step 12."""
    (tmp_path / "checkpoints").symlink_to(whole / "checkpoints")
    shutil.copytree(whole / "dequantizer", tmp_path / "dequantizer")
    shutil.rmtree(tmp_path / "dequantizer" / "checkpoints" / str(STEPS))
    assert state(tmp_path).step == 8
    runs.mode(train_dequantizer.run, config_of(), tmp_path)
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path), state(whole))
    rows = [row["step"] for row in metrics.read(tmp_path / "dequantizer")]
    assert rows == list(range(1, STEPS + 1))


@dataclasses.dataclass(frozen=True)
class Narrow(Dequantizer):
    """A flow of one parameter w, which is quick to compile: u is uniform in [0, s) for
    s = sigmoid(w), so log q = -d log s."""

    dropout: ClassVar[float] = 0.0

    def init(self, key, pixels):
        return {"w": jnp.zeros(())}

    def sample_batch(self, params, pixels, keys, *, train=False):
        s, shape = jax.nn.sigmoid(params["w"]), pixels.shape[1:]
        u = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
        return s * u, jnp.full(len(pixels), -math.prod(shape) * jnp.log(s))


@pytest.fixture(scope="module")
def narrow():
    """An experiment with this flow."""
    config = config_of(num_steps=2)
    config.dequantizer.name, config.dequantizer.model = f"{__name__}:Narrow", ConfigDict()
    return build.Experiment(config)


def test_the_loss_is_the_bound_plus_log_q(narrow, score, tmp_path):
    """For the first step of a run, with its draws; ``test_bound`` tests the bound itself."""
    (tmp_path / "checkpoints").symlink_to(score / "checkpoints")
    runs.mode(train_dequantizer.run, narrow.config, tmp_path)
    images = narrow.images("train")
    key = jax.random.fold_in(stream(jax.random.key(0), "train dequantizer"), 0)
    pixels = data.train_batches(images, 64, 0)[0]
    trained = narrow.adapter(narrow.restore(tmp_path).state.ema_params)

    @jax.jit
    def mean(pixels, key):
        draws = train_dequantizer.prepare_fn(narrow)(pixels, key, ())

        def elbo(k, u, flow_key, bound_key):
            x = 2 * (k + 0.5 * jax.random.uniform(flow_key, k.shape)) / 17 - 1
            return bound.elbo(trained, narrow.sde, x, bound_key, eps=narrow.eval_eps, u=u).total

        return jnp.mean(jax.vmap(elbo)(*draws)) / 64 + jnp.log(2)

    first, second = metrics.read(tmp_path / "dequantizer")
    assert first["loss"] == pytest.approx(float(mean(pixels, key)), rel=1e-5)
    found = narrow.restore_dequantizer(tmp_path, images).state
    assert second["step"] == found.step == 2 and found.params["w"] != 0


def test_a_dequantizer_with_nothing_to_train_is_refused():
    config = config_of()
    config.dequantizer.name = "uniform"
    with pytest.raises(ValueError, match="dequantizer.name=uniform has no parameters to train"):
        train_dequantizer.loss_fn(build.Experiment(config))


@pytest.mark.slow
def test_the_settings_of_both_trainings_reach_the_loop(score, tmp_path, monkeypatch):
    """Seed, flips and the decay of each average; the loop's own tests show what they do."""
    learners = []
    for mode in (train, train_dequantizer):
        monkeypatch.setattr(mode, "fit", lambda *given: learners.append(given))
    config = config_of()
    config.seed, config.data.flip = 7, True
    config.optim.ema, config.dequantizer.optim.ema = 0.9, 0.8
    runs.mode(train.run, config, tmp_path)
    runs.mode(train_dequantizer.run, config, score)
    found = [(e.config.seed, e.config.data.flip, each.update.ema) for e, _, each in learners]
    assert found == [(7, True, 0.9), (7, True, 0.8)]


@pytest.mark.slow
def test_only_the_dequantizer_learns(whole):
    """The score's checkpoint is untouched, and the parameters moved."""
    experiment = build.Experiment(config_of())
    images = experiment.images("train")
    fresh = sharding.initial_state(
        lambda: experiment.init_dequantizer(images), sharding.data_mesh()
    )
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), fresh.params, state(whole).params)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert experiment.restore(whole).step == tiny.get_config().training.num_steps
    assert isinstance(experiment.dequantizer("variational"), variational.Model)
    assert experiment.dequantizer("variational").levels == 17


@pytest.mark.slow
def test_another_flow_of_the_same_shapes_is_refused_and_other_arithmetic_is_not(whole):
    config = config_of()
    config.dequantizer.model.clipped = True
    experiment = build.Experiment(config)
    assert experiment.restore_dequantizer(whole, experiment.images("train")).step == STEPS
    config.dequantizer.model.heads = 4
    with pytest.raises(ValueError, match="config.dequantizer.model.heads is 4, the checkpoint's"):
        build.Experiment(config).restore_dequantizer(whole, experiment.images("train"))


@pytest.mark.slow
def test_another_score_is_refused_in_training_and_gives_a_warning_in_evaluation(whole, tmp_path):
    shutil.copytree(whole / "dequantizer", tmp_path / "dequantizer")
    config = config_of(num_steps=STEPS + 4)
    config.training.num_steps = 4
    runs.mode(train.run, config, tmp_path)
    with pytest.raises(ValueError, match="was trained with score .* but the newest checkpoint is"):
        runs.mode(train_dequantizer.run, config, tmp_path)
    config.eval.update(estimators=("bound",), dequantizers=("variational",))
    config.eval.bound.sweeps = 2
    config.eval.update(max_images=8, batch_size=8)
    config.eval.bound.update(control=False, proposal_bins=0)
    runs.mode(evaluate.run, config, tmp_path)
    warnings = json.loads((tmp_path / "report.json").read_text())["warnings"]
    assert any("trained for another score" in warning for warning in warnings)
