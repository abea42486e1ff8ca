"""Configs of diffusers' ``UNet2DModel``, and the weights and inputs at which it was computed.

``data/make_unet2d.py`` gives diffusers the same weights, and stores the outputs of its networks.
"""

import math
import zlib
from typing import Any

import numpy as np

PUBLISHED = {
    # google/ddpm-cifar10-32, with an eighth of the channels.
    "ddpm-cifar10-32": {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [16, 32, 32, 32],
        "center_input_sample": False,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 32,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    },
    # google/ddpm-celebahq-256, with a sixteenth of the channels and half of the blocks.
    "ddpm-celebahq-256": {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [8, 8, 16, 16, 32, 32],
        "center_input_sample": False,
        "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "in_channels": 3,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-06,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 256,
        "time_embedding_type": "positional",
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
    },
    # google/ncsnpp-celebahq-256, with an eighth of the channels, half of the blocks, and without
    # two of the levels before attention.
    "ncsnpp-celebahq-256": {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.0.4",
        "act_fn": "silu",
        "attention_head_dim": None,
        "block_out_channels": [16, 32, 32, 32, 32],
        "center_input_sample": False,
        "down_block_types": [
            *["SkipDownBlock2D"] * 2,
            "AttnSkipDownBlock2D",
            *["SkipDownBlock2D"] * 2,
        ],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 3,
        "layers_per_block": 1,
        "mid_block_scale_factor": 1.41421356237,
        "norm_eps": 1e-06,
        "norm_num_groups": None,
        "out_channels": 3,
        "sample_size": 256,
        "time_embedding_type": "fourier",
        "up_block_types": [*["SkipUpBlock2D"] * 2, "AttnSkipUpBlock2D", *["SkipUpBlock2D"] * 2],
    },
}
_SMALL = {"layers_per_block": 1, "norm_num_groups": 4, "block_out_channels": [8, 16]}
BLOCKS: dict[str, dict[str, Any]] = {
    "attention": _SMALL
    | {
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "time_embedding_dim": 24,
        "dropout": 0.5,  # It acts in training only.
    },
    "resnet": _SMALL
    | {
        "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
        "block_out_channels": [8, 16, 8],
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "act_fn": "mish",
        "center_input_sample": True,
    },
    "mixed": _SMALL
    | {
        "down_block_types": ["SkipDownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["ResnetUpsampleBlock2D", "SkipUpBlock2D"],
        "time_embedding_type": "fourier",
        "add_attention": False,
        "mid_block_scale_factor": 1.3,
        "act_fn": "gelu",
    },
    "skip": _SMALL
    | {
        "down_block_types": ["SkipDownBlock2D", "AttnSkipDownBlock2D"],
        "up_block_types": ["AttnSkipUpBlock2D", "SkipUpBlock2D"],
        "block_out_channels": [32, 32],
        "layers_per_block": 2,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
        "freq_shift": 1,
        "act_fn": "relu",
    },
    "no middle": _SMALL
    | {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "mid_block_type": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "norm_eps": 0.1,
        "act_fn": "swish",
    },
    "odd": _SMALL
    | {
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "block_out_channels": [9, 6],
        "norm_num_groups": 3,
        "attention_head_dim": 2,
    },
}
CONFIGS = BLOCKS | PUBLISHED


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The weight of this name; it keeps the signal's size, and no bias is 0 and no scale 1."""
    # This generator's numbers are the same in every version of NumPy, unlike default_rng's.
    value = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        value /= math.sqrt(np.prod(shape[1:]))
    elif name.startswith("time_proj"):
        value = 0.3 * value  # Smaller angles keep more digits.
    else:
        value = 0.2 * value + (1 if name.endswith("weight") else 0)
    return value.astype(np.float32)


def inputs(config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Two images ``(2, h, w, 3)`` and their timesteps, or sigmas."""
    size = max(8, 2 ** (len(config["block_out_channels"]) - 1))
    x = np.random.RandomState(size).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    fourier = config.get("time_embedding_type") == "fourier"
    return x, np.float32([1.2, 4.0] if fourier else [3.0, 417.0])


def pixels(images: np.ndarray) -> np.ndarray:
    """8x8 pixels of each image, from its first to its last ones."""
    picked = np.linspace(0, images.shape[1] - 1, 8).round().astype(int)
    return np.asarray(images)[:, picked][:, :, picked]
