"""Conversion of VDM's checkpoints, and their evaluation compared with VDM's formulas."""

import hashlib
import json
import math
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pictures
import pytest
import runs
import vdm_reference as reference
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from sbml.core.files import read_npz
from sbml.likelihood import discrete
from sbml.networks import vdm
from sbml.program.config import build
from sbml.program.config.config import default
from sbml.program.modes import convert
from sbml.program.modes import eval as evaluate
from sbml.sdes import times

GIVEN = reference.numbers()
SHAPE = (8, 8, 3)


def config() -> ConfigDict:
    """The config of CIFAR-10, for smaller images."""
    chosen = runpy.run_path(str(runs.ROOT / "configs" / "cifar10_vdm.py"))["get_config"]()
    chosen.data.update(source="image_folder", shape=SHAPE)
    return chosen


def save(folder: Path, tree: Any, name: str = "checkpoints-0/ckpt-3.flax") -> Path:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(serialization.msgpack_serialize(tree))
    return folder


def small(options: dict[str, Any], gamma: dict[str, Any] | None) -> dict[str, Any]:
    """Zeros in the layout of their parameters, for the network with these ``options``."""
    model = vdm.Model(**options)
    x, label = np.zeros((1, *SHAPE), np.float32), np.ones(1, np.float32)
    init = jax.eval_shape(lambda k: model.init(k, x, label, train=False), jax.random.key(0))
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), init["params"])
    return {"score_model": zeros, **({} if gamma is None else {"gamma": gamma})}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, workdir = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    tree = reference.train_state(reference.wide_params())
    save(source, {**tree, "step": np.int32(1)}, "checkpoints-0/ckpt-2.flax")
    runs.mode(convert.run, config(), workdir, save(source, tree))
    return workdir


@pytest.mark.slow
def test_every_array_arrives(converted: Path) -> None:
    fitted = runs.fitted(config(), converted)
    restored = build.Experiment(fitted).restore(converted)
    theirs = reference.wide_params()["score_model"]
    assert restored.step == 7 and int(restored.state.step) == 7
    jax.tree.map(np.testing.assert_array_equal, restored.state.ema_params, theirs)
    moved = jax.tree.map(lambda leaf: leaf + 1, theirs)
    jax.tree.map(np.testing.assert_array_equal, restored.state.params, moved)
    leaves = jax.tree.leaves(restored.state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
    adam = next(s for s in leaves if hasattr(s, "mu"))
    assert int(adam.count) == 6
    assert {float(np.asarray(a).min()) for a in jax.tree.leaves(adam.mu)} == {0.25}
    assert {float(np.asarray(a).max()) for a in jax.tree.leaves(adam.nu)} == {0.5}


@pytest.mark.slow
def test_the_work_directory_carries_network_schedule_and_label(converted: Path) -> None:
    fitted = runs.fitted(config(), converted)
    expected = {**reference.OPTIONS, "attention": False, "dropout": 0.1}
    assert {name: fitted.model.own[name] for name in expected} == expected
    experiment = build.Experiment(fitted)
    ends = GIVEN["wide/gamma/gamma"][[0, -1]]
    assert experiment.sde.gamma_0 == pytest.approx(ends[0], rel=1e-12)
    assert experiment.sde.gamma_1 == pytest.approx(ends[1], rel=1e-12)
    assert experiment.eval_eps == experiment.discrete_eps == 0.0
    assert experiment.adapter.log_snr_range == (-5.0, 13.3)
    metadata = experiment.restore(converted).metadata
    assert metadata["config"]["data"]["dequantization"] == "centre"
    origin = metadata["converted_from"]
    assert origin["file"].endswith("ckpt-3.flax") and origin["step"] == 7
    content = Path(origin["file"]).read_bytes()
    assert origin["sha256"] == hashlib.sha256(content).hexdigest()


def expected_terms(pixels: np.ndarray, u: np.ndarray, pair: Any, last: Any) -> dict[str, float]:
    """Prior, diffusion and reconstruction of one image in bits/dim, by VDM's formulas.

    The schedule is linear between the ends of the stored one. ``u`` are the times, and the noise is
    a e + b z for the ``pair`` e, z; ``last`` is the noise at time 0.
    """
    gamma_0, gamma_1 = GIVEN["wide/gamma/gamma"][[0, -1]]
    f = 2 * (pixels + 0.5) / 256 - 1
    mean2, var = 1 / (1 + math.exp(gamma_1)), 1 / (1 + math.exp(-gamma_1))
    prior = 0.5 * np.sum(mean2 * f**2 + var - math.log(var) - 1)
    values = 2 * (np.arange(256) + 0.5) / 256 - 1
    z_0 = f + math.exp(gamma_0 / 2) * last
    logits = -0.5 * (z_0[..., None] - values) ** 2 * math.exp(-gamma_0)
    own = -0.5 * (z_0 - f) ** 2 * math.exp(-gamma_0)
    reconstruction = np.sum(np.logaddexp.reduce(logits, axis=-1) - own)
    gamma = gamma_0 + (gamma_1 - gamma_0) * u
    a2 = np.exp(gamma_0 - gamma).reshape(-1, 1, 1, 1)
    eps = np.sqrt(a2) * pair[:, 0] + np.sqrt(1 - a2) * pair[:, 1]
    alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * gamma))).reshape(-1, 1, 1, 1) for s in (1, -1))
    z = np.float32(alpha * f + sigma * eps)
    label = np.float32(1000 * (gamma + 13.3) / 18.3)
    params = reference.wide_params()["score_model"]
    out = vdm.Model(**reference.OPTIONS).apply({"params": params}, z, label, train=False)
    errors = np.sum((eps - (z + np.asarray(out))) ** 2, axis=(1, 2, 3))
    diffusion = 0.5 * (gamma_1 - gamma_0) * np.mean(errors)
    terms = {"prior": prior, "diffusion": diffusion, "reconstruction": reconstruction}
    return {name: float(nats) / (f.size * math.log(2)) for name, nats in terms.items()}


@pytest.mark.slow
def test_an_evaluation_without_flags_is_their_bound(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From their checkpoint to the report, with times and noises that this test sets."""
    rng = np.random.default_rng(0)
    u = rng.uniform(size=(4, 2)).astype(np.float32)
    pair, last = (rng.normal(size=s).astype(np.float32) for s in ((2, 2, *SHAPE), SHAPE))
    monkeypatch.setitem(times.DRAWS, "lattice", lambda key, n, draws: u)
    monkeypatch.setattr(discrete, "_normals", lambda key, n, centre: (pair, last))
    for split, seed in (("test", 0), ("train", 10)):
        for i in range(4):
            pixels = pictures.pixels(8, 8, seed=seed + i)
            pictures.save(tmp_path / "images" / split / f"{i}.png", pixels)
    chosen = config()
    chosen.data.update(path=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    headline = (chosen.eval.estimators[0], chosen.eval.dequantizers[0])
    # Only the first cell of the table, without variance reduction, which would need other draws.
    chosen.eval.update(estimators=headline[:1], dequantizers=headline[1:], batch_size=4)
    chosen.eval.bound.sweeps = 2
    chosen.eval.bound.update(control=False, proposal_bins=0)
    runs.mode(evaluate.run, runs.fitted(chosen, converted), converted)
    table = read_npz(converted / "per_image.npz")
    for i in range(4):
        expected = expected_terms(pictures.pixels(8, 8, seed=i), u[i], pair, last)
        for name, value in expected.items():
            found = table[f"bound_categorical_{name}"][i]
            assert found == pytest.approx(value, rel=3e-4, abs=1e-6), name
        total = table["bound_categorical_bits_per_dim"][i]
        assert total == pytest.approx(sum(expected.values()), rel=3e-4)
    (result,) = json.loads((converted / "report.json").read_text())["results"]
    assert (result["estimator"], result["dequantizer"]) == headline == ("bound", "categorical")
    assert result["smallest_time"] == 0.0


GAMMAS: dict[str, Any] = {
    "fixed": (None, (-13.3, 5.0)),
    "scalar": ({"w": np.float32([-18.0]), "b": np.float32([-13.0])}, (-13.0, 5.0)),
}


@pytest.mark.slow
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize(
    "options",
    [
        {"width": 32, "depth": 2, "attention": True, "fourier": ()},
        {"width": 32, "depth": 1, "attention": False, "fourier": (128.0, 256.0)},
    ],
    ids=["attention", "fourier"],
)
def test_network_and_schedule_are_read_from_the_parameters(
    gamma: str, options: dict[str, Any], tmp_path: Path
) -> None:
    leaves, ends = GAMMAS[gamma]
    save(tmp_path, reference.train_state(small(options, leaves)), "state.msgpack")
    runs.mode(convert.run, config(), tmp_path / "ours", tmp_path / "state.msgpack")
    fitted = runs.fitted(config(), tmp_path / "ours")
    assert {name: fitted.model.own[name] for name in options} == options
    assert fitted.model.groups == 32
    assert (fitted.sde.gamma_0, fitted.sde.gamma_1) == pytest.approx(ends)


def test_other_constants_of_the_label_are_a_flag(tmp_path: Path) -> None:
    """They are also the ends of a fixed schedule."""
    save(tmp_path, reference.train_state(small({"width": 32, "depth": 1}, None)))
    chosen = config()
    chosen.score.log_snr_range = (-6.0, 12.0)
    chosen.sde.learned = True  # The ends of a checkpoint are numbers, whatever the config says.
    runs.mode(convert.run, chosen, tmp_path / "ours", tmp_path)
    fitted = runs.fitted(config(), tmp_path / "ours")
    assert (fitted.sde.gamma_0, fitted.sde.gamma_1) == (-12.0, 6.0)
    assert (
        json.loads((tmp_path / "ours" / "architecture.json").read_text())["sde"]["learned"] is False
    )
    experiment = build.Experiment(fitted)
    np.testing.assert_allclose(experiment.adapter.time_label(np.float32([0.0, 1.0])), [0, 1000])
    with pytest.raises(ValueError, match="has checkpoints already"):
        runs.mode(convert.run, config(), tmp_path / "ours", tmp_path)


def test_the_decoder_stays_where_it_was_trained() -> None:
    """At t = 0 half a bin is 3.02 standard deviations of the noise; other models use 3."""
    assert build.Experiment(config()).discrete_eps == 0.0
    moved = config()
    moved.eval.tau = 3.0
    experiment = build.Experiment(moved)
    assert experiment.discrete_eps == pytest.approx((13.3 - 2 * math.log(768)) / 18.3, rel=1e-4)
    assert experiment.dequantizer("truncated_normal").tau == pytest.approx(3.0)
    moved.eval.tau = -1.0
    with pytest.raises(ValueError, match="eval.tau=-1.0: give a number of at least 0"):
        build.Experiment(moved)


def change(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Set or, with None, remove a leaf or branch of the averaged parameters."""
    flat = flatten_dict(tree["ema_params"], sep="/")
    flat = {k: v for k, v in flat.items() if not (k + "/").startswith(path + "/")}
    tree["ema_params"] = unflatten_dict({**flat, **({} if leaf is None else {path: leaf})}, "/")


@pytest.mark.parametrize(
    ("path", "leaf", "message"),
    [
        ("score_model/dense0/bias", None, r"ema_params:\s+missing: dense0/bias \(128,\)"),
        ("score_model/extra", np.zeros(2), r"ema_params:\s+extra: extra \(2,\)"),
        ("score_model/dense0/bias", np.zeros(3), r"misshapen: dense0/bias is \(3,\)"),
        ("score_model/conv_in", None, "not hold a network of VDM: conv_in/kernel or conv_out/k"),
        ("score_model/conv_in/kernel", np.zeros((3, 3, 9, 32)), "reads 9 channels.*3 or 15"),
        ("score_model/conv_out/kernel", np.zeros((3, 3, 32, 1)), "images with 1 channels"),
        ("gamma/w", None, r"gamma has \['b'\]: VDM's schedules have w, b or l1, l2, l3"),
        ("score_model", None, r"training state of VDM's code: no 'score_model' in \['ema_params'"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_written(
    path: str, leaf: Any, message: str, tmp_path: Path
) -> None:
    tree = reference.train_state(small({"width": 32, "depth": 1}, GAMMAS["scalar"][0]))
    change(tree, path, leaf)
    with pytest.raises(ValueError, match=message):
        runs.mode(convert.run, config(), tmp_path / "ours", save(tmp_path, tree))
    assert runs.is_empty(tmp_path / "ours")


def test_errors_for_checkpoints_that_do_not_fit(tmp_path: Path) -> None:
    tree = reference.train_state(small({"width": 32, "depth": 1}, None))
    save(tmp_path, tree)
    with pytest.raises(ValueError, match="model.name='ncsnpp', .* is of a 'vdm': take a config"):
        runs.mode(convert.run, default(), tmp_path / "ours", tmp_path)
    del tree["opt_state"]["0"]["nu"]
    save(tmp_path, tree, "checkpoints-0/ckpt-4.flax")
    with pytest.raises(ValueError, match="ckpt-4.flax is not a training state of .* no 'nu' in"):
        runs.mode(convert.run, config(), tmp_path / "ours", tmp_path)
