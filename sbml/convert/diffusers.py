"""Converts a model of diffusers: ``UNet2DModel`` and the scheduler it was trained with.

    FOLDER/unet/config.json, diffusion_pytorch_model.safetensors     or these files in FOLDER
    FOLDER/scheduler/scheduler_config.json                           or this file in FOLDER

The scheduler tells the noise that the network was trained on and what it predicts:

    scheduler                      process x_t                              label of the network
    with ``beta_schedule``         BetaSchedule: DDPM, DDIM and others      number of the step
    ScoreSdeVeScheduler            VE                                       sigma
    EDMEulerScheduler and others   EDM                                      log(sigma) / 4
    FlowMatchEulerDiscrete...      RectifiedFlow                            t, times 1000

The files do not tell how pixels k of L levels were scaled. ``PIXELS`` has the choices of
``--pixels``; models of ``ScoreSdeVeScheduler`` have "unit" and all others "centred" if there is no
such flag. In the units of this package the training data are bin centres (``sbml.sdes.rescaled``).
There is no state of the optimizer: a training that continues starts Adam anew.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from sbml.convert import _files
from sbml.convert._files import ForeignState
from sbml.experiment import trained
from sbml.experiment.config import Config
from sbml.experiment.score import Process
from sbml.networks import unet2d

WEIGHTS = "diffusion_pytorch_model"

# How pixels were scaled: the numbers of levels L to scale and shift, which make them of ours.
PIXELS = {
    "centred": lambda n: (n / (n - 1), 0.0),  # 2 k / (L - 1) - 1
    "unit": lambda n: (n / (2 * (n - 1)), 0.5),  # k / (L - 1)
    "bins": lambda n: (1.0, 0.0),  # (2 k + 1) / L - 1
}


def recognises(source: epath.PathLike) -> bool:
    """Whether ``source`` is a folder of such a model."""
    source = epath.Path(source).expanduser()
    return any((folder / "config.json").exists() for folder in (source / "unet", source))


def convert(config: Config, workdir: epath.Path, source: epath.PathLike, pixels: str) -> None:
    """Convert the model in the folder ``source`` to ``workdir``; ``pixels`` is a key of ``PIXELS``,
    or empty for the scheduler's usual one."""
    source = epath.Path(source).expanduser()
    if pixels and pixels not in PIXELS:
        raise ValueError(f"--pixels={pixels}: choose one of {', '.join(PIXELS)}")
    unet = source / "unet" if (source / "unet").is_dir() else source
    architecture = _json(unet / "config.json")
    nested = source / "scheduler" / "scheduler_config.json"
    file = nested if nested.exists() else source / "scheduler_config.json"
    sde, score = _of_scheduler(file, _json(file))
    usual = "unit" if sde["name"] == "ve" else "centred"
    scale, shift = PIXELS[pixels or usual](config.data.levels)
    sde |= {"learned": False, "data_scale": scale, "data_shift": shift}
    try:
        model = {"name": "unet2d", **unet2d.fields(architecture)}
    except ValueError as error:
        raise ValueError(f"{unet / 'config.json'}: {error}") from error
    channels = architecture.get("in_channels", 3)
    if channels != config.data.shape[-1]:
        raise ValueError(
            f"{unet} is for images with {channels} channels, but config.data.shape is "
            f"{config.data.shape}: take a config of that data"
        )
    weights = _weights(unet)
    zeros = jax.tree.map(np.zeros_like, weights)
    trees = {"params": weights, "ema_params": weights, "mu": zeros, "nu": zeros}
    theirs = ForeignState(unet / f"{WEIGHTS}.safetensors", 0, 0, trees)
    sections = {"model": model, "sde": sde, "score": score}
    sections["training"] = {"smallest_time": Process(**sde).build().smallest_time}
    experiment, lines = _files.fit(config, sections, workdir)
    state = _files.state(jax.eval_shape(experiment.init_state), theirs)
    if jax.process_index() == 0:
        trained.write_architecture(workdir, sections)
    with experiment.config.training.checkpoints(workdir) as checkpoints:
        checkpoints.save(theirs.step, state, _files.metadata(experiment, theirs, "centre"))
        lines.append(f"pixels are {pixels or usual}: {scale:.6g} x + {shift:g} in our units x")
        lines.append(_files.line(theirs, checkpoints))
    print("\n".join(lines))


def _of_scheduler(
    file: epath.Path, scheduler: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the sections ``sde`` and ``score``."""
    kind, predicted = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")

    def refusal(key: str, needs: str) -> ValueError:
        return ValueError(f"{file}: {key} is {scheduler.get(key)!r}: {needs}")

    if kind.startswith("FlowMatch"):
        steps = float(scheduler.get("num_train_timesteps", 1000))
        return {"name": "rectified_flow"}, {
            "parameterization": "flow",
            "label": "time",
            "time_scale": steps,
        }
    if kind == "ScoreSdeVeScheduler":
        sde = {"name": "ve", "sigma_min": 0.01, "sigma_max": 1348.0}
        return sde | _numbers(scheduler, *sde), {"parameterization": "score", "label": "sigma"}
    if kind.startswith("EDM"):
        sde = {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
        kinds = {"epsilon": "edm", "v_prediction": "preconditioned"}
        if predicted not in kinds:
            raise refusal("prediction_type", f"known are {', '.join(kinds)}")
        return sde | _numbers(scheduler, *sde), {
            "parameterization": kinds[predicted],
            "label": "c_noise",
            "data_std": float(scheduler.get("sigma_data", 0.5)),
        }
    if "beta_schedule" not in scheduler:
        raise refusal(
            "_class_name",
            "known are schedulers with a beta_schedule, ScoreSdeVeScheduler, EDM schedulers and "
            "FlowMatch schedulers; evaluate others by sbml.Density",
        )
    kinds = {"epsilon": "noise", "sample": "x0", "v_prediction": "velocity"}
    if predicted not in kinds:
        raise refusal("prediction_type", f"known are {', '.join(kinds)}")
    for key in ("trained_betas", "rescale_betas_zero_snr"):
        if scheduler.get(key):
            raise refusal(key, "give sbml.AlphaBarTable these noise levels, and use sbml.Density")
    steps = int(scheduler.get("num_train_timesteps", 1000))
    schedule = scheduler["beta_schedule"]
    ends = {"beta_start": 1e-4, "beta_end": 0.02}
    sde = {"name": "beta_schedule", "schedule": schedule, "steps": steps, **ends}
    return sde | _numbers(scheduler, *ends), {
        "parameterization": kinds[predicted],
        "label": "time",
        "time_scale": steps - 1.0,
        # The networks get x_t itself: alpha^2 + sigma^2 = 1.
        "data_std": 1.0,
    }


def _numbers(scheduler: Mapping[str, Any], *names: str) -> dict[str, float]:
    return {name: float(scheduler[name]) for name in names if name in scheduler}


def _json(file: epath.Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text())
        return dict(found)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}): give the folder that save_pretrained of diffusers "
            "wrote, with the network's and the scheduler's config"
        ) from error


def _weights(unet: epath.Path) -> dict[str, Any]:
    """The parameters in the safetensors file of the folder ``unet``."""
    from safetensors import numpy as safetensors

    file = unet / f"{WEIGHTS}.safetensors"
    if not file.exists():
        held = sorted(path.name for path in unet.iterdir())
        raise ValueError(
            f"no {file.name} in {unet}, which has {', '.join(held)}: write it by "
            "UNet2DModel.from_pretrained(FOLDER).save_pretrained(FOLDER); pickles are not read"
        )
    try:
        state = safetensors.load(file.read_bytes())
    except Exception as error:  # safetensors raises errors of its own.
        raise ValueError(
            f"{file} is no safetensors file ({error}): check that the whole file was copied"
        ) from error
    kinds = sorted({str(array.dtype) for array in state.values() if array.dtype.itemsize < 4})
    if kinds:
        print(f"{file}: weights of {', '.join(kinds)} are evaluated in float32")
    return unet2d.params(state)
