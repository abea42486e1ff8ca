"""Conversion of Song et al.'s checkpoints, and errors that name what does not fit."""

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flowpp_numpy
import jax
import numpy as np
import pytest
import reference
import runs
from checkpoints import restore
from flax import serialization
from ml_collections import ConfigDict

from sbml.dequantizers import variational
from sbml.networks import ncsnpp
from sbml.program.config import build, compatibility
from sbml.program.config.config import default
from sbml.program.config.score import Network
from sbml.program.convert import _ncsnpp_options, score_flow
from sbml.program.convert._ncsnpp_options import read_options
from sbml.program.modes import convert
from sbml.program.runtime.state import TrainState

SHAPE = (16, 16, 3)


def theirs() -> dict[str, Any]:
    """The reference checkpoint, with parameters and moments that differ from the average."""
    tree = reference.checkpoint()
    tree["optimizer"]["target"] = jax.tree.map(lambda a: a + 1, tree["params_ema"])
    for path, value in (("grad_ema", 0.25), ("grad_sq_ema", 0.5)):
        _fill(tree["optimizer"]["state"]["param_states"], path, value)
    tree["optimizer"]["state"]["step"] = np.int32(6)
    return tree


def _fill(tree: dict[str, Any], name: str, value: float) -> None:
    for key, leaf in tree.items():
        if isinstance(leaf, dict):
            _fill(leaf, name, value)
        elif key == name:
            tree[key] = np.full_like(leaf, value)


def save(folder: Path, tree: dict[str, Any], step: int = 19, kind: str = "checkpoints") -> Path:
    (folder / kind).mkdir(parents=True, exist_ok=True)
    (folder / kind / f"checkpoint_{step}").write_bytes(serialization.msgpack_serialize(tree))
    return folder


def config() -> ConfigDict:
    chosen = default()
    chosen.data.update(source="image_folder", shape=SHAPE)
    return chosen


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, workdir = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    older = theirs()
    older["step"] = 1
    save(save(source, theirs()), older, step=2)
    (source / "checkpoints" / "checkpoints-meta").write_bytes(b"not a checkpoint")
    runs.mode(convert.run, config(), workdir, source)
    return workdir


def test_every_array_arrives(converted: Path) -> None:
    fitted = runs.fitted(config(), converted)
    restored = build.Experiment(fitted).restore(converted)
    expected = theirs()
    assert restored.step == 7 and int(restored.state.step) == 7
    for ours, tree in (
        (restored.state.params, expected["optimizer"]["target"]),
        (restored.state.ema_params, expected["params_ema"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, ours, tree)
    adam = next(
        s
        for s in jax.tree.leaves(restored.state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
        if hasattr(s, "mu")
    )
    assert int(adam.count) == 6
    assert {float(np.asarray(a).min()) for a in jax.tree.leaves(adam.mu)} == {0.25}
    assert {float(np.asarray(a).max()) for a in jax.tree.leaves(adam.nu)} == {0.5}


def test_the_work_directory_carries_the_architecture(
    converted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fitted = runs.fitted(config(), converted)
    assert {k: fitted.model.own[k] for k in reference.OPTIONS} == reference.OPTIONS
    assert "config.model.nf=16, as in the checkpoint, replaces 128" in capsys.readouterr().out
    free = config()
    free.model.update(dropout=0.3, dtype="bfloat16")
    fitted = runs.fitted(free, converted)
    assert (fitted.model.dropout, fitted.model.dtype) == (0.3, "bfloat16")
    capsys.readouterr()
    other = default("mlp")
    other.sde.name = "subvp"
    fitted = runs.fitted(other, converted)
    assert {k: fitted.model.own[k] for k in reference.OPTIONS} == reference.OPTIONS
    assert fitted.sde.name == "vp" and fitted.sde.own == {"beta_min": 0.1, "beta_max": 20.0}
    said = capsys.readouterr().out
    assert "config.model.name=ncsnpp, as in the checkpoint, replaces mlp" in said
    assert "config.sde.name=vp, as in the checkpoint, replaces subvp" in said
    assert runs.fitted(free, converted.parent) == build.Experiment(free).config


def test_the_report_warns_that_the_training_data_are_not_known(converted: Path) -> None:
    fitted = runs.fitted(config(), converted)
    metadata = build.Experiment(fitted).restore(converted).metadata
    assert metadata["config"]["data"]["dequantization"] == "none"
    assert "not known" in compatibility.other_data(metadata, {"data": None})[0]


def test_a_second_conversion_is_refused(converted: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has checkpoints already"):
        runs.mode(convert.run, config(), converted, save(tmp_path, theirs()))


# Every option that changes the parameters, alone and with others that change the same layers.
OPTIONS: list[dict[str, Any]] = [
    {},
    {"ch_mult": (1,), "attn_resolutions": ()},
    {"ch_mult": (2, 1, 3), "num_res_blocks": 2, "attn_resolutions": (16, 4)},
    {"ch_mult": (1, 1, 1), "attn_resolutions": (8, 4)},
    {"conditional": False},
    {"embedding_type": "fourier"},
    {"resblock_type": "ddpm"},
    {"resblock_type": "ddpm", "resamp_with_conv": False},
    {"resblock_type": "ddpm", "fir": True, "num_res_blocks": 3},
    {"resblock_type": "ddpm", "ch_mult": (1, 1, 1), "num_res_blocks": 2},
    {"progressive": "output_skip", "progressive_input": "input_skip"},
    {"progressive": "residual", "progressive_input": "residual", "fir": True},
    {"progressive_input": "input_skip", "progressive_combine": "cat"},
    {
        "resblock_type": "ddpm",
        "resamp_with_conv": False,
        "progressive": "residual",
        "progressive_input": "residual",
    },
    {
        "resblock_type": "ddpm",
        "progressive_input": "input_skip",
        "progressive_combine": "cat",
        "progressive": "output_skip",
        "embedding_type": "fourier",
    },
]
GIVEN = Network(name="ncsnpp").own


def shapes(fields: dict[str, Any]) -> Any:
    """The shapes of the parameters of the NCSN++ with these ``fields``."""
    x, label = np.zeros((1, *SHAPE), np.float32), np.ones(1, np.float32)
    model = ncsnpp.Model(**fields)
    init = jax.eval_shape(lambda k: model.init(k, x, label, train=False), jax.random.key(0))
    return init["params"]


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_read_from_the_parameters(options: dict[str, Any]) -> None:
    fields = {**GIVEN, "nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}
    fields |= options
    params = shapes(fields)
    # Options that the parameters do not show are given; all others have their defaults.
    untold = {"attn_resolutions": fields["attn_resolutions"]}
    if not any(name.startswith(("Upsample", "Downsample")) for name in params):
        untold["fir"] = fields["fir"]
    if fields["resblock_type"] == "biggan":
        untold["resamp_with_conv"] = fields["resamp_with_conv"]
    assert read_options(params, {**GIVEN, **untold}, 16) == fields


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "embedding"),
    [
        ("vp", "positional"),
        ("subvp", "fourier"),
        ("linear_ve", "positional"),
        ("ve", "fourier"),  # Their code has no other embedding for VE.
    ],
)
def test_scores_follow_their_conventions(name: str, embedding: str, tmp_path: Path) -> None:
    """The label is 999 t and the score -F / std; Fourier features are those of the label itself.
    For VE the label is sigma, Fourier features are those of its logarithm, and the score is F, or
    F / sigma with scale_by_sigma."""
    tree = theirs()
    if embedding == "fourier":
        w, names = np.random.default_rng(0).normal(size=16).astype(np.float32), ("", "_sq")
        for part in (tree["params_ema"], tree["optimizer"]["target"]):
            part["GaussianFourierProjection_0"] = {"W": w}
            part["Dense_0"]["kernel"] = np.tile(part["Dense_0"]["kernel"], (2, 1))
        moments = tree["optimizer"]["state"]["param_states"]
        moments["GaussianFourierProjection_0"] = {"W": {f"grad{n}_ema": 0 * w for n in names}}
        twice = {k: np.tile(v, (2, 1)) for k, v in moments["Dense_0"]["kernel"].items()}
        moments["Dense_0"]["kernel"] = twice
    save(tmp_path, tree)
    x, t = (
        np.random.default_rng(1).normal(size=(2, *SHAPE)).astype(np.float32),
        np.array([0.1, 0.7]),
    )
    for divides in (False, True)[: 1 + (name == "ve")]:
        chosen = config()
        chosen.sde.update(name=name, learned=True)  # Its numbers are fixed after a conversion.
        if divides:
            chosen.score.parameterization = "scaled_score"
        runs.mode(convert.run, chosen, tmp_path / f"ours{divides}", tmp_path)
        fitted = runs.fitted(chosen, tmp_path / f"ours{divides}")
        assert not fitted.sde.learned
        experiment = build.Experiment(fitted)
        params = experiment.restore(tmp_path / f"ours{divides}").state.ema_params
        ours = experiment.adapter(params).batch(x, t, None)
        std = np.asarray(experiment.sde.std(t))
        seen = np.log(std) if name == "ve" else 999 * t
        # The same network, but the argument of the embedding is computed here.
        kind = "fourier_linear" if embedding == "fourier" else "positional"
        network = ncsnpp.Model(**{**reference.OPTIONS, "embedding_type": kind})
        out = np.asarray(network.apply({"params": params}, x, np.float32(seen), train=False))
        scale = (1 / std if divides else np.ones(2)) if name == "ve" else -1 / std
        expected = out * scale[:, None, None, None]
        np.testing.assert_allclose(ours, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_options_that_the_parameters_do_not_show_must_be_given() -> None:
    fields = {"nf": 8, "ch_mult": (1, 1), "num_res_blocks": 1, "attn_resolutions": (16,)}
    params = shapes(fields)
    with pytest.raises(ValueError, match=r"do not tell which.*\(16,\), \(8,\)"):
        read_options(params, {**GIVEN, "attn_resolutions": ()}, 16)
    assert read_options(params, {**GIVEN, "attn_resolutions": (8,)}, 16)["attn_resolutions"] == (8,)


@pytest.mark.slow
def test_leaves_that_do_not_fit_are_named(tmp_path: Path) -> None:
    tree = theirs()
    params = tree["params_ema"]
    params["Conv_1"].pop("bias")
    params.update(Dense_9={"bias": np.zeros(2)}, Conv_x={"a": np.zeros(2)})
    params["Conv_0"].update(bias=np.zeros(15))
    with pytest.raises(ValueError, match="Differences from the nearest:") as caught:
        runs.mode(convert.run, config(), tmp_path / "ours", save(tmp_path, tree))
    lines = {line.strip() for line in str(caught.value).splitlines()[1:]}
    assert lines == {
        "missing: Conv_1/bias (3,)",
        "extra: Dense_9/bias (2,)",
        "extra: Conv_x/a (2,)",
        "misshapen: Conv_0/bias is (15,), should be (16,)",
    }


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Trace each candidate for the options once, because all trees below have the same ones."""
    eval_shape, known = jax.eval_shape, {}

    def once(init: Any, *arguments: Any) -> Any:
        model = init.func.__self__
        if model not in known:
            known[model] = eval_shape(init, *arguments)
        return known[model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ncsnpp_options, "jax", SimpleNamespace(eval_shape=once, random=jax.random))
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("change", "nearest"),
    [
        (
            lambda p: p["ResnetBlockBigGANpp_2"]["Conv_0"].update(kernel=np.zeros((3, 3, 16, 7))),
            "misshapen: ResnetBlockBigGANpp_2/Conv_0/kernel is (3, 3, 16, 7)",
        ),
        (lambda p: p["AttnBlockpp_0"].pop("NIN_0"), "missing: AttnBlockpp_0/NIN_0/W"),
        (lambda p: p.pop("Dense_0"), "missing: Dense_0/bias (64,)"),
    ],
)
def test_a_leaf_that_options_are_read_from_is_named(change: Any, nearest: str) -> None:
    params = theirs()["params_ema"]
    change(params)
    with pytest.raises(ValueError, match=r"nearest:\s+" + re.escape(nearest)):
        read_options(params, GIVEN, 16)


def test_numbers_that_are_not_finite_are_named(tmp_path: Path) -> None:
    tree = theirs()
    tree["params_ema"]["Conv_1"]["bias"] = np.array([0.0, np.nan, 1e39])
    with pytest.raises(ValueError, match=r"ema_params/Conv_1/bias has 2 of 3 values that are NaN"):
        runs.mode(convert.run, config(), tmp_path / "ours", save(tmp_path, tree))
    assert runs.is_empty(tmp_path / "ours")


def test_parameters_are_checked_too(tmp_path: Path) -> None:
    tree = theirs()
    tree["optimizer"]["target"]["Conv_1"]["bias"] = np.zeros(5)
    with pytest.raises(ValueError, match=r"params:\s+misshapen: Conv_1/bias is \(5,\)"):
        runs.mode(convert.run, config(), tmp_path / "ours", save(tmp_path, tree))
    assert runs.is_empty(tmp_path / "ours")


@pytest.mark.slow
def test_leaves_of_a_dequantizer_are_named_before_anything_is_written(tmp_path: Path) -> None:
    tree = flow_of(variational.Model("cifar10", filters=8, components=3, blocks=2, heads=2))[0]
    params = tree["params_ema"]["params"]
    params["MixLogisticAttnCoupling_0"].pop("proj_in_b")
    params["Norm_0"].update(norm0_b=np.zeros((2, 3)))
    params.pop("Norm_1")
    params.update(Foo={"x": np.zeros(2)}, foo=np.zeros(2))
    save(save(tmp_path, theirs()), tree, step=6, kind=score_flow.DEQUANTIZER)
    with pytest.raises(ValueError, match="missing: .*proj_in/bias") as caught:
        runs.mode(convert.run, config(), tmp_path / "ours", tmp_path)
    for message in (
        "misshapen: Norm_0/norm0/bias",
        "missing: Norm_1/norm0/bias",
        "extra: Foo/x (2,)",
        "extra: foo (2,)",
    ):
        assert message in str(caught.value)
    assert runs.is_empty(tmp_path / "ours")


def test_errors_for_sources_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--source=DIR"):
        runs.mode(convert.run, config(), tmp_path, None)
    with pytest.raises(ValueError, match=r"no checkpoint_N or ckpt-N.flax in"):
        runs.mode(convert.run, config(), tmp_path, tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "checkpoint_3").write_bytes(b"\x93\x01")
    with pytest.raises(ValueError, match="checkpoint_3 cannot be read as a flax msgpack file"):
        runs.mode(convert.run, config(), tmp_path, tmp_path)
    save(tmp_path, {"weights": np.zeros(2)}, step=4)
    with pytest.raises(ValueError, match=r"no known code: it has \['weights'\]; known are Song"):
        runs.mode(convert.run, config(), tmp_path, tmp_path)
    save(tmp_path, {"optimizer": {"target": {}, "state": {"param_states": {}}}}, step=5)
    with pytest.raises(ValueError, match=r"no 'params_ema' in \['optimizer'\]"):
        runs.mode(convert.run, config(), tmp_path, tmp_path)
    (folder / "checkpoint_6").write_bytes(serialization.msgpack_serialize(np.zeros(2)))
    with pytest.raises(ValueError, match="checkpoint_6 cannot .*it holds a ndarray, no dict"):
        runs.mode(convert.run, config(), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="model.name='mlp', .* is of a 'ncsnpp': take a config"):
        runs.mode(convert.run, default("mlp"), tmp_path, save(tmp_path, theirs(), step=7))
    gamma = config()
    gamma.sde.name = "linear_gamma"
    with pytest.raises(ValueError, match="sde.name='linear_gamma': their models have one of vp"):
        runs.mode(convert.run, gamma, tmp_path, tmp_path)
    muon = config()
    muon.optim.name = "muon"
    with pytest.raises(ValueError, match="optim.name=muon: the checkpoint is of Adam"):
        runs.mode(convert.run, muon, tmp_path / "ours", tmp_path)
    other = config()
    other.data.shape = (16, 16, 1)
    with pytest.raises(ValueError, match="images with 3 channels"):
        runs.mode(convert.run, other, tmp_path / "ours", save(tmp_path, theirs(), step=8))


def flow_of(model: variational.Model) -> tuple[dict[str, Any], Any]:
    """A checkpoint of their code for the dequantizer ``model``, and its random parameters."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), np.zeros((2, *SHAPE), np.uint8))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    names = flowpp_numpy.foreign(params)
    flow = {
        "step": 11,
        "params_ema": {"params": names},
        "optimizer": {
            "target": names,
            "state": {
                "step": np.int32(11),
                "param_states": {
                    module: {k: {"grad_ema": v, "grad_sq_ema": v} for k, v in leaves.items()}
                    for module, leaves in names.items()
                },
            },
        },
    }
    return flow, params


@pytest.mark.slow
@pytest.mark.parametrize("design", list(variational.DESIGNS))
def test_the_dequantizer_is_converted_with_the_score(
    design: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = variational.Model(design, filters=8, components=3, blocks=2, heads=2)
    flow, params = flow_of(model)
    save(save(tmp_path, theirs()), flow, step=6, kind=score_flow.DEQUANTIZER)
    chosen = config()
    chosen.dequantizer.model.heads = 2
    runs.mode(convert.run, chosen, tmp_path / "ours", tmp_path)
    fitted = runs.fitted(chosen, tmp_path / "ours")
    experiment = build.Experiment(fitted)
    assert experiment.dequantizer("variational") == model
    with experiment.config.dequantizer.training.checkpoints(tmp_path / "ours") as checkpoints:
        assert checkpoints.steps() == [11]
        template = jax.eval_shape(
            lambda p: TrainState.create(p, experiment.dequantizer_optimizer), params
        )
        restored = restore(checkpoints, template)
    jax.tree.map(np.testing.assert_array_equal, restored.state.ema_params, params)
    score = experiment.restore(tmp_path / "ours")
    assert restored.metadata["score"]["step"] == score.step
    printed = capsys.readouterr().out
    assert "dequantizer.model.heads=2" in printed and "model.attn_resolutions=[" in printed
    for found, kind in ((score, "checkpoints"), (restored, score_flow.DEQUANTIZER)):
        origin = found.metadata["converted_from"]
        assert origin["step"] == found.step and kind in origin["file"]
        sha256 = hashlib.sha256(Path(origin["file"]).read_bytes()).hexdigest()
        assert origin["sha256"] == sha256
        assert f"{origin['file']} (sha256 {sha256}): step {found.step}" in printed
