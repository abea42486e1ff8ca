"""diffusers' UNet2DModel: its outputs, its files, errors for wrong configs and sizes, training."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import unet2d_reference as reference
from flax.traverse_util import flatten_dict
from linen import normal, shapes
from safetensors.numpy import load_file, save_file

from sbml.core.types import Array
from sbml.networks import unet2d
from sbml.program.runtime.trees import differences

DATA = np.load(Path(__file__).parent / "data" / "unet2d.npz")
SHAPES = json.loads(str(DATA["shapes"]))
ONE_LEVEL = {
    "block_out_channels": (8,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": "none",
    "up_block_types": ("AttnUpBlock2D",),
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def state(name: str) -> dict[str, np.ndarray]:
    return {key: reference.weight(key, tuple(shape)) for key, shape in SHAPES[name].items()}


def model(name: str, **options: Any) -> unet2d.Model:
    return unet2d.Model(**unet2d.fields(reference.CONFIGS[name]), **options)


def misfits(name: str, params: dict[str, Any]) -> list[str]:
    expected = shapes(model(name), reference.inputs(reference.CONFIGS[name])[0].shape)
    flat = flatten_dict(params, sep="/")
    return differences(flat, {path: np.empty(shape) for path, shape in expected.items()})


@functools.partial(jax.jit, static_argnums=0)
def apply(model: unet2d.Model, params: dict[str, Any], x: Array, label: Array) -> Array:
    return model.apply({"params": params}, x, label, train=False)


# ---- diffusers' functions and files -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", reference.CONFIGS)
def test_outputs_are_those_of_diffusers(name: str) -> None:
    params = unet2d.params(state(name))
    assert misfits(name, params) == []
    out = apply(model(name), params, *reference.inputs(reference.CONFIGS[name]))
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(reference.pixels(out), DATA[name], rtol=0, atol=1e-5)


def test_outputs_in_float64_are_those_of_diffusers() -> None:
    """The config has Fourier features of the time, because diffusers always computes the positional
    ones in float32."""
    params = unet2d.params(state("mixed"))
    with jax.enable_x64(True):
        inputs = map(np.float64, reference.inputs(reference.CONFIGS["mixed"]))
        out = apply(model("mixed", dtype="float64"), params, *inputs)
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(reference.pixels(out), DATA["mixed"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_files_of_half_precision_are_read_as_float32(dtype: Any, tmp_path: Path) -> None:
    small = {name: value.astype(dtype) for name, value in state("mixed").items()}
    save_file(small, tmp_path / "weights.safetensors")
    params = unet2d.params(load_file(tmp_path / "weights.safetensors"))
    assert misfits("mixed", params) == []
    leaves = flatten_dict(params, sep="/")
    assert {leaf.dtype for leaf in leaves.values()} == {np.dtype("float32")}
    kernel = leaves["down_blocks.0/resnets.0/conv1/kernel"]
    expected = small["down_blocks.0.resnets.0.conv1.weight"].astype(np.float32)
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))


def test_old_names_of_weights_are_read() -> None:
    """Old files have other names for the weights of attention, and contain the Fourier features
    twice, under two names."""
    new = state("ncsnpp-celebahq-256")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in new.items():
        for after, before in old.items():
            name = name.replace(f".{after}.", f".{before}.")
        renamed[name] = value
    renamed["time_proj.W"] = renamed["time_proj.weight"]
    assert len(set(new) - set(renamed)) == 3 * 4 * 2
    jax.tree.map(np.testing.assert_array_equal, unet2d.params(renamed), unet2d.params(new))


def test_weights_that_do_not_fit_are_named() -> None:
    weights = state("mixed")
    weights["extra.3.weight"] = np.zeros((2, 3))
    weights["conv_out.bias"] = np.zeros(4)
    del weights["mid_block.resnets.1.norm1.weight"]
    assert misfits("mixed", unet2d.params(weights)) == [
        "missing: mid_block/resnets.1/norm1/scale (16,)",
        "extra: extra.3/kernel (3, 2)",
        "misshapen: conv_out/bias is (4,), should be (3,)",
    ]


def test_fields_are_the_keys_of_a_config() -> None:
    config = reference.CONFIGS["ddpm-cifar10-32"]
    fields = unet2d.fields({**config, "num_class_embeds": None, "num_train_timesteps": 1000})
    unused = {"_class_name", "_diffusers_version", "in_channels", "out_channels", "sample_size"}
    assert set(fields) == set(config) - unused
    assert fields["attention_head_dim"] == 0
    assert fields["down_block_types"] == tuple(config["down_block_types"])
    assert unet2d.fields({}) == {}


# ---- training -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_untrained_network_predicts_0() -> None:
    x, label = normal(0, 2, 4, 4, 1), jnp.asarray([0.1, 700.0])
    network = unet2d.Model(**ONE_LEVEL, time_embedding_type="fourier")
    start = jax.jit(functools.partial(network.init_with_output, train=False))
    out, _ = start(jax.random.key(1), x, label)
    assert jnp.abs(out).max() < 1e-3
