"""Reference numbers for tests, computed by the code that was published with "Variational Diffusion
Models".

They belong to two small models with random weights, for images of 8x8x3 with 256 levels. ``wide``
has 64 channels, and its noise schedule is a network. The noise schedule of ``scalar`` has two
numbers; only results that do not need its network are stored. Weights, inputs and random draws are
float32. The results were computed from them in float64, and those called ``float32`` in float32.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

DATA = Path(__file__).parent / "data"
LEVELS = 256
LOG_SNR_RANGE = (-5.0, 13.3)
OPTIONS = {"width": 64, "depth": 1, "groups": 32, "fourier": (128.0, 256.0), "dropout": 0.0}


def numbers() -> dict[str, np.ndarray]:
    """All stored arrays except the parameters; float32 is converted to float64."""
    with np.load(DATA / "vdm_small.npz") as file:
        arrays = {name: file[name] for name in file}
    return {k: v.astype(float) if v.dtype == np.float32 else v for k, v in arrays.items()}


def wide_params() -> dict[str, Any]:
    """The parameters of ``wide`` in float32: those of the modules ``gamma`` and ``score_model``."""
    with np.load(DATA / "vdm_wide.npz") as file:
        return unflatten_dict(dict(file), sep="/")


def train_state(params: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint in the layout of the published code, whose averaged parameters are ``params``.

    The parameters themselves and the optimizer's moments have other values, so that a test notices
    if they are taken instead.
    """

    def like(value: float) -> dict[str, Any]:
        return jax.tree.map(lambda leaf: np.full_like(leaf, value), params)

    adam = {"count": np.int32(6), "mu": like(0.25), "nu": like(0.5)}
    return {
        "step": np.int32(7),
        "params": jax.tree.map(lambda leaf: leaf + 1, params),
        "ema_params": params,
        "opt_state": {"0": adam, "1": {"inner_state": {}}, "2": {}},
    }


def exact(tree: Any) -> Any:
    """``tree`` with its leaves as float64 arrays of JAX."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)
