"""Writes ``unet2d.npz``, what diffusers' networks answer, which ``tests/test_unet2d.py`` reads.

    PYTHONPATH=tests python tests/data/make_unet2d.py

It needs torch and diffusers, which the tests then do without; the file was made with versions 2.6.0
and 0.42.1, by Python 3.13. It has, for every config of ``unet2d_reference``, the names and shapes
in the network's state dict, and pixels of the output, computed in float64.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unet2d_reference as reference
from diffusers import UNet2DModel


def network(config: dict[str, Any]) -> tuple[Any, dict[str, tuple[int, ...]]]:
    model = UNet2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    state = {name: torch.from_numpy(reference.weight(name, s)) for name, s in shapes.items()}
    model.load_state_dict(state)
    return model.eval(), shapes


def answer(model: Any, config: dict[str, Any], dtype: torch.dtype) -> np.ndarray:
    x, label = (torch.from_numpy(a).to(dtype) for a in reference.inputs(config))
    with torch.no_grad():
        return model.to(dtype)(x.permute(0, 3, 1, 2), label).sample.permute(0, 2, 3, 1).numpy()


def write() -> None:
    arrays, listing = {}, {}
    for name, config in reference.CONFIGS.items():
        model, listing[name] = network(config)
        # PyTorch's float32 has to be well within the tests' tolerance of the float64, or it would
        # be luck whether another float32 network's is.
        single, double = (answer(model, config, d) for d in (torch.float32, torch.float64))
        found = np.abs(single - double).max()
        print(f"{name}: {double.std():.2f}, float32 differs by {found:.1e}")
        assert found < 5e-6
        arrays[name] = reference.pixels(double)
    data = Path(__file__).parent / "unet2d.npz"
    np.savez_compressed(data, shapes=json.dumps(listing), **arrays)


if __name__ == "__main__":
    write()
