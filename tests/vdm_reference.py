"""Numbers of the code that was published with "Variational Diffusion Models", to compare with.

Two small models with random weights, 8x8x3 images of 256 levels: ``wide`` has 64 channels and a
schedule that is a network, ``scalar`` a schedule of two numbers; of the latter only what needs no
network is stored. Weights, inputs and draws are float32; results are float64, at these.
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
    """Everything but the parameters, floats as float64."""
    with np.load(DATA / "vdm_small.npz") as file:
        found = {name: file[name] for name in file}
    return {k: v.astype(float) if v.dtype == np.float32 else v for k, v in found.items()}


def wide_params() -> dict[str, Any]:
    """The parameters of ``wide``, ``gamma`` and ``score_model``, float32."""
    with np.load(DATA / "vdm_wide.npz") as file:
        return unflatten_dict(dict(file), sep="/")


def train_state(params: dict[str, Any]) -> dict[str, Any]:
    """Their checkpoint whose average is ``params``, with parameters and moments of other values."""

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
    """Leaves as float64 arrays of JAX."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, float), tree)
