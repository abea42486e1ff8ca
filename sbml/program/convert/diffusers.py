"""Converts a model of diffusers: ``UNet2DModel`` and the scheduler it was trained with.

    FOLDER/unet/config.json, diffusion_pytorch_model.safetensors     or these files in FOLDER
    FOLDER/scheduler/scheduler_config.json                           or this file in FOLDER

The scheduler tells the noise that the network was trained on and what it predicts:

    scheduler                      process x_t                              label of the network
    with ``beta_schedule``         BetaSchedule: DDPM, DDIM and others      number of the step
    ScoreSdeVeScheduler            VE                                       sigma
    EDMEulerScheduler and others   EDM                                      log(sigma) / 4
    FlowMatchEulerDiscrete...      RectifiedFlow                            num_train_timesteps t

The files do not tell how pixels k of L levels were scaled. ``PIXELS`` has the choices of
``--pixels``; models of ``ScoreSdeVeScheduler`` have "unit" and all others "centred" if there is no
such flag. In the units of this package the training data are bin centres (``sbml.sdes.rescaled``).
The files have no state of the optimizer: a training that continues starts Adam anew.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml.networks import unet2d
from sbml.program.config.config import Config, default
from sbml.program.config.fields import errors_of
from sbml.program.config.score import Process
from sbml.program.convert import _files
from sbml.program.convert._files import ForeignState
from sbml.program.runtime import weights

WEIGHTS = "diffusion_pytorch_model"

# How pixels were scaled: the formula, and a function from L to the scale and the shift with which
# scale x + shift are these pixels, for the bin centres x of this package.
PIXELS = {
    "centred": ("2 k / (L - 1) - 1", lambda n: (n / (n - 1), 0.0)),
    "unit": ("k / (L - 1)", lambda n: (n / (2 * (n - 1)), 0.5)),
    "bins": ("(2 k + 1) / L - 1", lambda n: (1.0, 0.0)),
}

# Keys of schedulers that change the noise levels or the network's label, and the usual values.
_ONLY = {
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "snr_shift_scale": None,
    "timestep_type": "discrete",
    "invert_sigmas": False,
}


def recognises(source: epath.PathLike) -> bool:
    """Whether ``source`` is a folder of such a model, perhaps one that lacks files."""
    source = epath.Path(source).expanduser()
    files = "config.json", "scheduler_config.json", "model_index.json", f"{WEIGHTS}.*"
    folders = source, source / "unet", source / "scheduler"
    found = any(path for folder in folders for file in files for path in folder.glob(file))
    # A run of other code can have a config.json too.
    return found and not any(source.glob("checkpoints*"))


def config_of(source: epath.PathLike) -> ConfigDict:
    """A config of 256 levels for the model in the folder ``source``."""
    file, architecture = _unet(source)
    config = default("unet2d")
    config.data.shape = _shape(file, architecture)
    return config


def convert(config: Config, workdir: epath.Path, source: epath.PathLike, pixels: str) -> list[str]:
    """Convert the model in the folder ``source`` to ``workdir``; ``pixels`` is a key of ``PIXELS``,
    or empty for the scheduler's usual one."""
    if pixels and pixels not in PIXELS:
        raise ValueError(f"--pixels={pixels}: choose one of {', '.join(PIXELS)}")
    unet, architecture = _unet(source)
    source = epath.Path(source).expanduser()
    nested = source / "scheduler" / "scheduler_config.json"
    file = nested if nested.exists() else source / "scheduler_config.json"
    sde, score = _of_scheduler(file, _json(file))
    pixels = pixels or ("unit" if sde["name"] == "ve" else "centred")
    formula, units = PIXELS[pixels]
    scale, shift = units(config.data.levels)
    sde |= {"learned": False, "data_scale": scale, "data_shift": shift}
    with errors_of(file):
        process = Process(**sde).build()
    with errors_of(unet):
        model = {"name": "unet2d", **unet2d.fields(architecture)}
    shape = _shape(unet, architecture, [*config.data.shape[:2]])
    if shape != config.data.shape:
        raise ValueError(
            f"{unet}: sample_size and in_channels are those of images of shape {shape}, but "
            f"config.data.shape is {config.data.shape}: take a config of that data"
        )
    file, params = _params(unet.parent)
    zeros = jax.tree.map(np.zeros_like, params)
    trees = {"params": params, "ema_params": params, "mu": zeros, "nu": zeros}
    theirs = ForeignState(file, 0, 0, trees)
    sections = {"model": model, "sde": sde, "score": score}
    sections["training"] = {"smallest_time": process.smallest_time}
    scaling = (
        f"the network's pixels are {formula} of k = 0 .. L - 1, L = {config.data.levels} "
        f"(--pixels={pixels}): {scale:.6g} x + {shift:g} of the x of this package"
    )
    return _files.store(config, workdir, sections, theirs, "centre", remarks=[scaling])


def _unet(source: epath.PathLike) -> tuple[epath.Path, dict[str, Any]]:
    """The file that describes the network in the folder ``source``, and its content."""
    source = epath.Path(source).expanduser()
    file = (source / "unet" if (source / "unet").is_dir() else source) / "config.json"
    return file, _json(file)


def _shape(
    file: epath.Path, architecture: Mapping[str, Any], usual: list[int] | None = None
) -> tuple[Any, ...]:
    """The shape of the images of the network that ``file`` describes as ``architecture``; ``usual``
    is the height and width if it has none."""
    size = architecture.get("sample_size")
    size = usual if size is None else [size, size] if isinstance(size, int | float) else size
    if size is None:
        raise ValueError(f"{file} has no sample_size: give a config with data.shape")
    if not isinstance(size, list) or len(size) != 2:
        raise ValueError(f"{file}: sample_size is {size!r}: give one number, or two of them")
    return (*size, architecture.get("in_channels", 3))


def _of_scheduler(
    file: epath.Path, scheduler: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the sections ``sde`` and ``score``."""

    def refusal(key: str, needs: str) -> ValueError:
        return ValueError(f"{file}: {key} is {scheduler.get(key)!r}: {needs}")

    def numbers(*names: str) -> dict[str, float]:
        for name in names:
            if not isinstance(scheduler.get(name), int | float):
                raise refusal(name, "give the file that save_pretrained writes, with this number")
        return {name: scheduler[name] for name in names}

    def kind_of(**kinds: str) -> str:
        # Files of old versions have no such key: their models predict the noise.
        predicted = scheduler.get("prediction_type", "epsilon")
        if not isinstance(predicted, str) or predicted not in kinds:
            raise refusal("prediction_type", f"known are {', '.join(kinds)}")
        return kinds[predicted]

    for key, usual in _ONLY.items():
        if scheduler.get(key) not in (None, usual):
            raise refusal(key, f"only {usual!r} is converted; evaluate others by sbml.Density")
    kind = str(scheduler.get("_class_name"))
    if kind.startswith("FlowMatch"):
        (steps,) = numbers("num_train_timesteps").values()
        score = {"parameterization": "flow", "label": "time", "time_scale": float(steps)}
        return {"name": "rectified_flow"}, score
    if kind == "ScoreSdeVeScheduler":
        sde = {"name": "ve", **numbers("sigma_min", "sigma_max")}
        return sde, {"parameterization": "score", "label": "sigma"}
    if kind.startswith("EDM"):
        return {"name": "edm", **numbers("sigma_min", "sigma_max")}, {
            "parameterization": kind_of(epsilon="edm", v_prediction="preconditioned"),
            "label": "c_noise",
            "data_std": numbers("sigma_data")["sigma_data"],
        }
    if "beta_schedule" not in scheduler:
        raise refusal(
            "_class_name",
            "known are schedulers with a beta_schedule, ScoreSdeVeScheduler, EDM schedulers and "
            "FlowMatch schedulers; evaluate others by sbml.Density",
        )
    (steps,) = numbers("num_train_timesteps").values()
    sde = {"name": "beta_schedule", "schedule": scheduler["beta_schedule"], "steps": steps}
    return sde | numbers("beta_start", "beta_end"), {
        "parameterization": kind_of(epsilon="noise", sample="x0", v_prediction="velocity"),
        "label": "time",
        "time_scale": steps - 1.0,
        # The networks get x_t itself: alpha^2 + sigma^2 = 1.
        "data_std": 1.0,
    }


def _json(file: epath.Path) -> dict[str, Any]:
    reason: object = "it is no JSON object"
    try:
        if isinstance(found := json.loads(file.read_text()), dict):
            return found
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
    raise ValueError(
        f"{file} cannot be read ({reason}): give the folder that save_pretrained of diffusers "
        "wrote, with the network's and the scheduler's config"
    )


def _params(unet: epath.Path) -> tuple[epath.Path, dict[str, Any]]:
    """The safetensors file of the folder ``unet``, and the parameters in it."""
    file = unet / f"{WEIGHTS}.safetensors"
    if not file.exists():
        held = sorted(path.name for path in unet.iterdir())
        raise ValueError(
            f"no {file.name} in {unet}, which has {', '.join(held)}: write it by "
            "UNet2DModel.from_pretrained(FOLDER).save_pretrained(FOLDER); pickles are not read"
        )
    state = weights.read(file, "safetensors file")
    half = sorted({array.dtype.name for array in state.values() if array.dtype.itemsize < 4})
    if half:
        print(f"{file}: weights of {', '.join(half)} are evaluated in float32")
    return file, unet2d.params(state)
