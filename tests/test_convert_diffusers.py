"""Conversion of diffusers' folders, and the restored scores compared with its schedulers' formulas.

The folders have small networks whose weights the test knows. ``test_unet2d.py`` compares the
network, and the names of its arrays, with diffusers.
"""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import linen
import ml_dtypes
import numpy as np
import pictures
import pytest
import runs
import unet2d_reference as reference
from safetensors.numpy import save_file

import sbml
from sbml.core.files import read_npz
from sbml.dequantizers import uniform
from sbml.networks import unet2d
from sbml.program.config import build
from sbml.program.config.config import default
from sbml.program.modes import convert
from sbml.program.modes import eval as evaluate
from sbml.score import from_prediction
from sbml.sdes import BetaSchedule

SHAPE = (4, 4, 3)
NETWORK = {
    "_class_name": "UNet2DModel",
    "sample_size": 4,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D"],
    "norm_num_groups": 4,
    "time_embedding_dim": 8,
}
FOURIER = {**NETWORK, "time_embedding_type": "fourier"}  # It reads sigma.
BETAS = {"num_train_timesteps": 50, "beta_start": 0.004, "beta_end": 0.2}
SIGMAS = {"sigma_min": 0.02, "sigma_max": 60.0}


def config() -> Any:
    """A config of 256 levels whose network, SDE and score are not those of the folder."""
    chosen = default("mlp")
    chosen.data.update(source="image_folder", shape=SHAPE, levels=256)
    return chosen


def model(network: dict[str, Any]) -> unet2d.Model:
    return unet2d.Model(**unet2d.fields(network))


def state(network: dict[str, Any]) -> dict[str, np.ndarray]:
    """Weights with the names and shapes of PyTorch's arrays."""
    leaves = {"kernel": "weight", "scale": "weight", "W": "weight", "bias": "bias"}
    found = {}
    for path, shape in linen.shapes(model(network), (1, *SHAPE)).items():
        *modules, leaf = path.split("/")
        name = ".".join([*modules, leaves[leaf]])
        shape = (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]
        found[name] = reference.weight(name, shape)
    return found


@functools.partial(jax.jit, static_argnums=0)
def output(model: unet2d.Model, params: Any, x: Any, label: Any) -> Any:
    return model.apply({"params": params}, x, label, train=False)


def save(
    folder: Path, scheduler: Any, network: Any = NETWORK, weights: Any = None, **keys: Any
) -> Path:
    """A folder as diffusers' ``save_pretrained`` of a pipeline writes it."""
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps({**network, **keys}))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(state(network) if weights is None else weights, file)
    return folder


def restored(workdir: Path) -> tuple[build.Experiment, Any]:
    """The experiment of a converted work directory, and its score."""
    experiment = build.Experiment(runs.fitted(config(), workdir))
    return experiment, experiment.adapter(experiment.restore(workdir).state.ema_params)


# ---- scores --------------------------------------------------------------------------------------

# What a scheduler's documentation defines for its number s (a step, a sigma or a time): the factors
# a of the data and b of the noise in y_s = a y + b z, the factor of y_s in the network's input, the
# network's label, and E[z | y_s] as a function of its output F and of y_s.
Formulas = tuple[float, float, float, float, Callable[[Any, Any], Any]]


def alpha_bar(schedule: str, i: int) -> float:
    n, start, end = (BETAS[k] for k in ("num_train_timesteps", "beta_start", "beta_end"))
    steps = range(i + 1)
    if schedule == "squaredcos_cap_v2":

        def f(t: float) -> float:
            return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

        betas = [min(1 - f((j + 1) / n) / f(j / n), 0.999) for j in steps]
    else:
        u = [j / (n - 1) for j in steps]
        betas = {
            "linear": [start + (end - start) * each for each in u],
            "scaled_linear": [
                (math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * each) ** 2 for each in u
            ],
            "sigmoid": [start + (end - start) / (1 + math.exp(6 - 12 * each)) for each in u],
        }[schedule]
    return math.prod(1 - beta for beta in betas)


def of_betas(kind: str, schedule: str) -> Callable[[int], Formulas]:
    def formulas(step: int) -> Formulas:
        a_bar = alpha_bar(schedule, step)
        a, b = math.sqrt(a_bar), math.sqrt(1 - a_bar)
        noise = {
            "epsilon": lambda f, y: f,
            "sample": lambda f, y: (y - a * f) / b,
            "v_prediction": lambda f, y: b * y + a * f,
        }[kind]
        return a, b, 1.0, step, noise

    return formulas


def of_edm(kind: str) -> Callable[[float], Formulas]:
    def formulas(sigma: float) -> Formulas:
        d = 0.4
        total = sigma**2 + d**2
        c_out = {"epsilon": 1, "v_prediction": -1}[kind] * sigma * d / math.sqrt(total)

        def noise(f: Any, y: Any) -> Any:
            denoised = d**2 / total * y + c_out * f
            return (y - denoised) / sigma

        return 1.0, sigma, 1 / math.sqrt(total), math.log(sigma) / 4, noise

    return formulas


def of_ve(sigma: float) -> Formulas:
    return 1.0, sigma, 1.0, sigma, lambda f, y: -sigma * f  # F is the score


def of_flow(t: float) -> Formulas:
    # F is z - y, and y_t = (1 - t) y + t z
    return 1 - t, t, 1.0, 250 * t, lambda f, y: y + (1 - t) * f


DDPM = {
    "_class_name": "DDPMScheduler",
    **BETAS,
    "variance_type": "fixed_small",
    "clip_sample": True,
}
LINEAR = {**DDPM, "beta_schedule": "linear", "prediction_type": "epsilon", "trained_betas": None}
EDM = {"_class_name": "EDMEulerScheduler", **SIGMAS, "sigma_data": 0.4}
VE = {"_class_name": "ScoreSdeVeScheduler", **SIGMAS, "num_train_timesteps": 20, "snr": 0.15}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 250, "shift": 3.0}
SCHEDULERS: dict[str, tuple[dict[str, Any], Any]] = {
    **{
        f"{schedule} {kind}": (
            {**DDPM, "beta_schedule": schedule, "prediction_type": kind},
            of_betas(kind, schedule),
        )
        for schedule, kind in (
            ("linear", "epsilon"),
            ("linear", "sample"),
            ("linear", "v_prediction"),
            ("scaled_linear", "epsilon"),
            ("squaredcos_cap_v2", "epsilon"),
            ("sigmoid", "epsilon"),
        )
    },
    "DDIM without prediction_type": (
        {**DDPM, "_class_name": "DDIMScheduler", "beta_schedule": "linear"},
        of_betas("epsilon", "linear"),
    ),
    "VE": (VE, of_ve),
    "EDM epsilon": ({**EDM, "prediction_type": "epsilon"}, of_edm("epsilon")),
    "EDM v_prediction": ({**EDM, "prediction_type": "v_prediction"}, of_edm("v_prediction")),
    "flow": (FLOW, of_flow),
}
UNITS = {
    "centred": lambda k: 2 * k / 255 - 1,
    "unit": lambda k: k / 255,
    "bins": lambda k: (2 * k + 1) / 256 - 1,
}


def times(name: str) -> list[tuple[float, float]]:
    """Pairs of a time in [0, 1] of this package and the number of the scheduler there."""
    if "linear" in name or "cos" in name or "sigmoid" in name or "DDIM" in name:
        return [(i / 49, i) for i in (0, 7, 49)]
    if name == "VE":
        return [(t, 0.02 * 3000**t) for t in (0.1, 0.6)]
    if "EDM" in name:
        return [(sigma / 60, sigma) for sigma in (0.05, 3.0)]
    return [(t, t) for t in (0.01, 0.7)]


@jax.jit
def at(score: Any, x: Any, t: Any) -> Any:
    return score(x, t, None)


def check(score: Any, formulas: Callable[[Any], Formulas], name: str, pixels: str) -> None:
    """Compare the score with E[z | y] of the scheduler's documentation, for noisy images y."""
    rng, network = np.random.default_rng(0), FOURIER if name == "VE" else NETWORK
    k, z = rng.integers(0, 256, SHAPE), rng.normal(size=SHAPE)
    scale = (UNITS[pixels](255) - UNITS[pixels](0)) / (2 * 255 / 256)  # of y, over that of x
    params = unet2d.params(state(network))
    for t, number in times(name):
        a, b, factor, label, noise_of = formulas(number)
        y = a * UNITS[pixels](k) + b * z
        x = a * ((2 * k + 1) / 256 - 1) + b / scale * z
        out = output(model(network), params, np.float32(factor * y)[None], np.float32([label]))
        expected = noise_of(np.asarray(out[0], np.float64), y)
        found = -b / scale * np.asarray(at(score, np.float32(x), np.float32(t)))
        np.testing.assert_allclose(found, expected, rtol=0, atol=3e-4 * np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_score_is_that_of_the_scheduler(name: str, tmp_path: Path) -> None:
    scheduler, formulas = SCHEDULERS[name]
    source = save(tmp_path / "theirs", scheduler, FOURIER if name == "VE" else NETWORK)
    runs.mode(convert.run, config(), tmp_path / "ours", source)
    check(restored(tmp_path / "ours")[1], formulas, name, "unit" if name == "VE" else "centred")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, workdir = (tmp_path_factory.mktemp(name) for name in ("theirs", "ours"))
    runs.mode(convert.run, config(), workdir, save(source / "folder", LINEAR))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("pixels", ["unit", "bins"])
def test_a_flag_tells_how_pixels_were_scaled(
    pixels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder is flat, as those of older models of diffusers are."""
    folder = save(tmp_path / "theirs", LINEAR)
    for file in list(folder.glob("*/*")):
        file.rename(folder / file.name)
    for empty in ("unet", "scheduler"):
        (folder / empty).rmdir()
    runs.mode(convert.run, config(), tmp_path / "ours", folder, pixels=pixels)
    score = restored(tmp_path / "ours")[1]
    check(score, of_betas("epsilon", "linear"), "linear", pixels)
    formula = {"unit": "k / (L - 1)", "bins": "(2 k + 1) / L - 1"}[pixels]
    assert f"pixels are {formula} of k" in capsys.readouterr().out


@pytest.mark.slow
def test_the_checkpoint_tells_what_it_is(converted: Path) -> None:
    experiment, _ = restored(converted)
    metadata = experiment.restore(converted).metadata
    assert metadata["config"]["data"]["dequantization"] == "centre"
    assert metadata["converted_from"]["file"].endswith("unet/diffusion_pytorch_model.safetensors")
    # The first noise level is the smallest time: the network has seen nothing below.
    assert experiment.eps == experiment.eval_eps == experiment.discrete_eps == 0.0
    assert experiment.sde.log_snr(jnp.zeros(())) == pytest.approx(
        math.log((1 - 0.004) / 0.004) + 2 * math.log(256 / 255), abs=1e-5
    )


@pytest.mark.slow
def test_a_folder_is_loaded_as_the_model_that_its_conversion_gives(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    density, t = sbml.load(save(tmp_path / "theirs", LINEAR)), jnp.asarray(0.4)
    assert not capsys.readouterr().out  # The fields of the network are no news for its owner.
    x = jnp.linspace(-1, 1, math.prod(SHAPE)).reshape(SHAPE)
    assert density.shape == SHAPE and density.levels == 256
    np.testing.assert_array_equal(density.score(x, t), restored(converted)[1](x, t))


# ---- likelihoods ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_bits_per_dim_are_those_of_the_original_units_by_the_change_of_variables(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-log P(k) <= -log p_y(y) - d log(2 / 255), since a bin of y has the width 2 / 255."""
    u = np.random.default_rng(1).uniform(size=SHAPE).astype(np.float32)
    monkeypatch.setattr(uniform.Model, "sample", lambda *_: (jnp.asarray(u), jnp.zeros(())))
    for split, seed in (("test", 0), ("train", 10)):
        for i in range(2):
            image = pictures.pixels(*SHAPE, seed=seed + i)
            pictures.save(tmp_path / "images" / split / f"{i}.png", image)
    chosen = config()
    chosen.data.update(path=str(tmp_path / "images"), cache_dir=str(tmp_path / "cache"))
    # Steps of equal times are the same in both units, whatever their error is.
    chosen.eval.ode.update(fixed_steps=16, solver_budget=1.0)
    chosen.eval.update(estimators=("ode",), batch_size=2)
    chosen.eval.ode.update(trace="exact", subset=1)
    runs.mode(evaluate.run, runs.fitted(chosen, converted), converted)
    found = read_npz(converted / "per_image.npz")["ode_uniform_bits_per_dim"]

    params, sde = unet2d.params(state(NETWORK)), BetaSchedule("linear", 0.004, 0.2, 50)
    score = from_prediction(
        lambda y, t: output(model(NETWORK), params, y, sde.step(t)), "noise", sde, batched=True
    )
    trace, solver = sbml.divergence.Trace("exact"), sbml.ode.Solver(fixed_steps=16)
    density = sbml.Density(score, sde, SHAPE, trace=trace, solver=solver)
    # The bin of k in our units, [2 k / 256 - 1, 2 (k + 1) / 256 - 1), in theirs.
    k = np.stack([pictures.pixels(*SHAPE, seed=i) for i in range(2)])
    y = 2 * (k + u - 0.5) / 255 - 1
    nats = -np.asarray(density.log_prob(jnp.asarray(y, jnp.float32)), np.float64)
    expected = (nats / math.prod(SHAPE) - math.log(2 / 255)) / math.log(2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CMStochasticIterativeScheduler", "beta_schedule": 0}, "_class_name is"),
        ({"beta_schedule": "laplace"}, "scheduler_config.json: .*schedule.*laplace.*linear"),
        ({"beta_end": 1e-3}, "scheduler_config.json: .*more signal than noise"),
        ({"beta_end": 0}, "beta_end is None: give the file that save_pretrained writes"),
        ({"num_train_timesteps": "50"}, "num_train_timesteps is '50': give the file"),
        ({"prediction_type": "flow_prediction"}, "'flow_prediction': known are epsilon, sample, v"),
        ({**EDM, "prediction_type": "sample"}, "prediction_type is 'sample': known are epsilon, v"),
        ({**EDM, "sigma_data": 0}, "sigma_data is None: give the file"),
        ({"trained_betas": [0.1, 0.2]}, r"trained_betas is \[0.1, 0.2\]: only None is converted"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr is True: only False"),
        ({"snr_shift_scale": 3.0}, "snr_shift_scale is 3.0: only None"),
        ({"prediction_type": []}, r"prediction_type is \[\]: known are epsilon, sample, v_pred"),
        ({"beta_start": {"a": 1}}, r"beta_start is {'a': 1}: give the file"),
        ({"timestep_type": "continuous"}, "timestep_type is 'continuous': only 'discrete'"),
        ({**FLOW, "invert_sigmas": True}, "invert_sigmas is True: only False is converted"),
    ],
)
def test_schedulers_that_do_not_fit_are_errors(
    changes: dict[str, Any], message: str, tmp_path: Path, unchecked: None
) -> None:
    """A change to 0 leaves the key out."""
    scheduler = {k: v for k, v in {**LINEAR, **changes}.items() if v != 0 or v is False}
    refused(save(tmp_path / "theirs", scheduler), tmp_path / "ours", message)


def refused(source: Path, workdir: Path, message: str, **flags: Any) -> None:
    with pytest.raises(ValueError, match=message):
        runs.mode(convert.run, config(), workdir, source, **flags)
    assert runs.is_empty(workdir)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"up_block_types": ["KUpBlock2D", "UpBlock2D"]}, "unet/config.json: .*KUpBlock2D"),
        ({"_class_name": "UNet1DModel"}, "unet/config.json: _class_name is 'UNet1DModel'"),
        ({"in_channels": 1, "out_channels": 1}, r"shape \(4, 4, 1\), but config.data.shape is"),
        ({"sample_size": 32}, r"shape \(32, 32, 3\), but config.data.shape is \(4, 4, 3\)"),
        ({"sample_size": {"a": 4.0}}, r"sample_size is {'a': 4.0}: give one number, or two of"),
        ({"sample_size": [4]}, r"sample_size is \[4\]: give one number, or two of"),
        ({"sample_size": [4, 8]}, r"shape \(4, 8, 3\), but config.data.shape is"),
    ],
)
def test_networks_that_do_not_fit_are_errors(
    keys: dict[str, Any], message: str, tmp_path: Path
) -> None:
    refused(save(tmp_path / "theirs", LINEAR, **keys), tmp_path / "ours", message)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("conv_out.bias", None, r"missing: conv_out/bias \(3,\)"),
        ("extra.bias", (2,), r"extra: extra/bias \(2,\)"),
        ("conv_out.bias", (4,), r"misshapen: conv_out/bias is \(4,\), should be \(3,\)"),
    ],
)
def test_weights_that_do_not_fit_are_errors(
    name: str, shape: tuple[int, ...] | None, message: str, tmp_path: Path
) -> None:
    weights = state(NETWORK)
    weights.pop(name, None)
    weights |= {} if shape is None else {name: np.zeros(shape, np.float32)}
    source = save(tmp_path / "theirs", LINEAR, weights=weights)
    refused(source, tmp_path / "ours", f"model.safetensors.*\n  {message}")


def test_folders_with_missing_or_damaged_files_are_errors(tmp_path: Path) -> None:
    folder, ours = save(tmp_path / "theirs", LINEAR), tmp_path / "ours"
    refused(folder, ours, "--pixels=raw: choose one of centred, unit, bins", pixels="raw")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-100])
    refused(folder, ours, r"cannot be read as a safetensors file \(.*\): check .* copied whole")
    save_file({"conv_in.bias": np.zeros(2, np.int64)}, file)
    refused(folder, ours, r"\(conv_in.bias is of type I64; known are F16, BF16, F32, F64\)")
    file.rename(file.with_suffix(".bin"))
    refused(
        folder, ours, r"no diff.*safetensors in .*, which has config.json, .*\.bin: write it by"
    )
    (folder / "unet" / "config.json").unlink()
    refused(
        folder, ours, r"unet/config.json cannot be read \(No such file or directory\): give the"
    )
    for content, reason in (
        ("{", "Expecting property name .*"),
        ("[1]", "it is no JSON object"),
        ("[" * 100_000, "maximum recursion depth exceeded.*"),
    ):
        (folder / "unet" / "config.json").write_text(content)
        refused(folder, ours, rf"config.json cannot be read \({reason}\): give the folder that")
    (folder / "scheduler" / "scheduler_config.json").unlink()
    (folder / "unet" / "config.json").write_text("{}")
    refused(folder, ours, "scheduler_config.json cannot be read .*: give the folder that save_pre")


@pytest.mark.slow
def test_a_folder_is_not_converted_into_a_work_directory_with_checkpoints(
    converted: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="has checkpoints already: convert into a new --workdir"):
        runs.mode(convert.run, config(), converted, save(tmp_path / "theirs", LINEAR))


def test_only_folders_of_diffusers_have_the_flag(tmp_path: Path) -> None:
    (tmp_path / "theirs" / "checkpoints").mkdir(parents=True)
    (tmp_path / "theirs" / "config.json").write_text("{}")  # of another code
    refused(tmp_path / "theirs", tmp_path / "ours", "is no folder of diffusers", pixels="unit")


@pytest.mark.parametrize(
    "dtype", [pytest.param(np.float16, marks=pytest.mark.slow), ml_dtypes.bfloat16]
)
def test_weights_of_half_precision_are_evaluated_in_float32(
    dtype: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {name: value.astype(dtype) for name, value in state(NETWORK).items()}
    source = save(tmp_path / "theirs", LINEAR, weights=small)
    runs.mode(convert.run, config(), tmp_path / "ours", source)
    assert f"weights of {np.dtype(dtype).name} are evaluated in float32" in capsys.readouterr().out
    params = build.Experiment(runs.fitted(config(), tmp_path / "ours")).restore(tmp_path / "ours")
    expected = unet2d.params(small)
    jax.tree.map(np.testing.assert_array_equal, params.state.ema_params, expected)
