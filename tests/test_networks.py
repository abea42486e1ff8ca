"""Networks against counted parameters, the original code's numbers and independent computations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import scipy.signal
from flax import linen as nn
from flax.traverse_util import flatten_dict

from sbml import networks
from sbml.networks import _layers as layers
from sbml.networks import mlp, ncsnpp

SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def strict_ranks() -> Any:
    with jax.numpy_rank_promotion("raise"):
        yield


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def shapes(model: nn.Module, x_shape: tuple[int, ...] = (2, 8, 8, 3)) -> dict[str, tuple]:
    """Path -> shape of every parameter; asserts that they are float32 on the way."""
    x, label = jnp.zeros(x_shape), jnp.ones(x_shape[0])
    params = jax.eval_shape(lambda: model.init(KEY, x, label, train=False))["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    return {path: leaf.shape for path, leaf in flatten_dict(params, sep="/").items()}


def perturbed(model: nn.Module, x: jax.Array) -> dict[str, Any]:
    """Initial parameters plus noise, so that no layer is zero."""
    params = jax.jit(lambda: model.init(KEY, x, jnp.ones(len(x)), train=False))()
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(KEY, len(leaves))
    noise = [0.1 * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, [p + e for p, e in zip(leaves, noise, strict=True)])


# ---- the registry -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_every_network_keeps_the_contract(name: str) -> None:
    model, x, label = networks.get(name)(), jnp.zeros((2, 32, 32, 3)), jnp.ones(2)
    params = jax.eval_shape(lambda: model.init(KEY, x, label, train=False))
    assert hash(model) == hash(networks.get(name)())
    out = jax.eval_shape(
        lambda p: model.apply(p, x, label, train=True, rngs={"dropout": KEY}), params
    )
    assert (out.shape, out.dtype) == (x.shape, jnp.dtype("float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_unknown_network_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'unet'.*mlp, ncsnpp"):
        networks.get("unet")


# ---- NCSN++: the whole network ------------------------------------------------------------------


@pytest.mark.parametrize(("blocks", "count"), [(4, 61_804_419), (8, 106_632_579)])
def test_parameter_counts_of_the_paper(blocks: int, count: int) -> None:
    tree = shapes(ncsnpp.Model(num_res_blocks=blocks), (1, 32, 32, 3))
    assert sum(np.prod(shape, dtype=int) for shape in tree.values()) == count


def test_output_equals_the_original_code() -> None:
    given = reference.load()
    model = ncsnpp.Model(**reference.OPTIONS)
    made = shapes(model, given.x.shape)
    assert made == {k: v.shape for k, v in flatten_dict(given.params, sep="/").items()}
    apply = jax.jit(lambda x, label: model.apply({"params": given.params}, x, label, train=False))
    np.testing.assert_allclose(apply(given.x, 999 * given.t), given.network, atol=1e-5, rtol=0)
    # An image's result does not depend on the others of its batch.
    others = apply(given.x[[1, 1, 1, 0]], 999 * given.t[[1, 1, 1, 0]])
    np.testing.assert_allclose(others, given.network[[1, 1, 1, 0]], atol=1e-5, rtol=0)


# Options -> weights that appear or change shape, modules that disappear, relative to SMALL with 8x8
# images: 8 channels at 8x8, 16 at 4x4. Its blocks: 0 encodes, 1 halves, 2 encodes, 3 and 4 are in
# the middle, 5 and 6 decode, 7 doubles, 8 and 9 decode.
BLOCK = "ResnetBlockBigGANpp_"
TREES: list[tuple[dict[str, Any], dict[str, tuple[int, ...]], set[str]]] = [
    ({"fir": True, "fir_kernel": (1, 2, 1)}, {}, set()),
    ({"skip_rescale": False, "init_scale": 1.0, "dropout": 0.0}, {}, set()),
    ({"progressive_combine": "cat", "resamp_with_conv": False}, {}, set()),
    ({"nonlinearity": "elu"}, {}, set()),
    ({"nonlinearity": "relu"}, {}, set()),
    ({"nonlinearity": "lrelu", "dtype": "bfloat16"}, {}, set()),
    (
        {"conditional": False},
        {},
        {"Dense_0", "Dense_1"} | {f"{BLOCK}{i}/Dense_0" for i in range(10)},
    ),
    (
        {"embedding_type": "fourier"},
        {"GaussianFourierProjection_0/W": (8,), "Dense_0/kernel": (16, 32)},
        set(),
    ),
    ({"attn_resolutions": ()}, {}, {"AttnBlockpp_1", "AttnBlockpp_2"}),
    (
        {"progressive": "output_skip"},
        {
            "GroupNorm_0/scale": (16,),
            "Conv_1/kernel": (3, 3, 16, 3),
            "GroupNorm_1/scale": (8,),
            "Conv_2/kernel": (3, 3, 8, 3),
        },
        set(),
    ),
    (
        {"progressive": "residual"},
        {
            "GroupNorm_0/scale": (16,),
            "Conv_1/kernel": (3, 3, 16, 16),
            "Upsample_0/Conv_0/kernel": (3, 3, 16, 8),
            "GroupNorm_1/scale": (8,),
            "Conv_2/kernel": (3, 3, 8, 3),
        },
        set(),
    ),
    (
        {"progressive": "residual", "progressive_input": "residual", "fir": True},
        {
            "GroupNorm_0/scale": (16,),
            "Conv_1/kernel": (3, 3, 16, 16),
            "Downsample_0/Conv2d_0/weight": (3, 3, 3, 8),
            "Upsample_0/Conv2d_0/weight": (3, 3, 16, 8),
            "GroupNorm_1/scale": (8,),
            "Conv_2/kernel": (3, 3, 8, 3),
        },
        set(),
    ),
    ({"progressive_input": "residual"}, {"Downsample_0/Conv_0/kernel": (3, 3, 3, 8)}, set()),
    ({"progressive_input": "input_skip"}, {"Combine_0/Conv_0/kernel": (1, 1, 3, 8)}, set()),
    (
        {"progressive_input": "input_skip", "progressive_combine": "cat"},
        {
            "Combine_0/Conv_0/kernel": (1, 1, 3, 8),
            f"{BLOCK}2/GroupNorm_0/scale": (16,),
            f"{BLOCK}2/Conv_0/kernel": (3, 3, 16, 16),
            f"{BLOCK}6/GroupNorm_0/scale": (32,),
            f"{BLOCK}6/Conv_0/kernel": (3, 3, 32, 16),
            f"{BLOCK}6/Conv_2/kernel": (1, 1, 32, 16),
        },
        {f"{BLOCK}2/Conv_2"},
    ),
]
# The same where resampling is not part of a block: blocks 1 and 7 go, six come before the double.
DDPM: list[tuple[dict[str, Any], dict[str, tuple[int, ...]]]] = [
    (
        {},
        {"Downsample_0/Conv_0/kernel": (3, 3, 8, 8), "Upsample_0/Conv_0/kernel": (3, 3, 16, 16)},
    ),
    ({"resamp_with_conv": False}, {}),
    (
        {"fir": True},
        {
            "Downsample_0/Conv2d_0/weight": (3, 3, 8, 8),
            "Upsample_0/Conv2d_0/weight": (3, 3, 16, 16),
        },
    ),
    (
        {"progressive": "residual", "progressive_input": "residual"},
        {
            "GroupNorm_0/scale": (16,),
            "Conv_1/kernel": (3, 3, 16, 16),
            "Downsample_0/Conv_0/kernel": (3, 3, 8, 8),
            "Downsample_1/Conv_0/kernel": (3, 3, 3, 8),
            "Upsample_0/Conv_0/kernel": (3, 3, 16, 16),
            "Upsample_1/Conv_0/kernel": (3, 3, 16, 8),
            "GroupNorm_1/scale": (8,),
            "Conv_2/kernel": (3, 3, 8, 3),
        },
    ),
]


def weights(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Every parameter but the biases; and for each weight that has a bias, its bias is there."""
    tree = shapes(model)
    biases = {path for path in tree if path.split("/")[-1] in ("bias", "b")}
    kept = {path: shape for path, shape in tree.items() if path not in biases}
    owners = {path.rpartition("/")[0] for path in kept} - {"GaussianFourierProjection_0"}
    assert owners == {path.rpartition("/")[0] for path in biases}
    return kept


@pytest.mark.parametrize(("options", "added", "gone"), TREES)
def test_tree_of_each_option(options: dict, added: dict, gone: set[str]) -> None:
    plain = weights(ncsnpp.Model(**SMALL))
    left = {k: v for k, v in plain.items() if not any(k.startswith(f"{g}/") for g in gone)}
    assert all(any(k.startswith(f"{g}/") for k in plain) for g in gone)
    assert weights(ncsnpp.Model(**SMALL | options)) == left | added


@pytest.mark.parametrize(("options", "added"), DDPM)
def test_tree_of_ddpm_blocks(options: dict, added: dict) -> None:
    made = weights(ncsnpp.Model(**SMALL | options | {"resblock_type": "ddpm"}))
    inside = {k: v for k, v in made.items() if k.startswith("Resnet")}
    around = {k: v for k, v in made.items() if not k.startswith(("Resnet", "Attn", "Dense"))}
    head = {"GroupNorm_0/scale": (8,), "Conv_1/kernel": (3, 3, 8, 3)}
    assert around == {"Conv_0/kernel": (3, 3, 3, 8)} | head | added
    # Channels in and out of the encoder's two blocks, the middle's two and the decoder's four.
    channels = [(8, 8), (8, 16), (16, 16), (16, 16), (32, 16), (24, 16), (24, 8), (16, 8)]
    expected = {}
    for i, (c, d) in enumerate(channels):
        block = f"ResnetBlockDDPMpp_{i}"
        expected |= {f"{block}/Conv_0/kernel": (3, 3, c, d), f"{block}/Conv_1/kernel": (3, 3, d, d)}
        expected |= {f"{block}/GroupNorm_0/scale": (c,), f"{block}/GroupNorm_1/scale": (d,)}
        expected |= {f"{block}/Dense_0/kernel": (32, d)}
        expected |= {f"{block}/NIN_0/W": (c, d)} if c != d else {}
    assert inside == expected


def every_option() -> list[dict[str, Any]]:
    return [options for options, *_ in TREES] + [
        options | {"resblock_type": "ddpm"} for options, _ in DDPM
    ]


@pytest.mark.parametrize("options", every_option(), ids=str)
def test_output_of_each_option_is_a_float32_image(options: dict) -> None:
    model, x, label = ncsnpp.Model(**SMALL | options), jnp.zeros((2, 8, 12, 3)), jnp.ones(2)
    out, _ = jax.eval_shape(
        lambda: model.init_with_output({"params": KEY, "dropout": KEY}, x, label, train=True)
    )
    assert (out.shape, out.dtype) == (x.shape, jnp.dtype("float32"))


class Calls(dict):
    """Path of a module -> what it was called with and what it returned."""

    def __init__(self, options: dict, x: jax.Array):
        model = ncsnpp.Model(**SMALL | options)
        params = perturbed(model, x)

        def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
            out = call(*args, **kwargs)
            if context.method_name == "__call__":
                self["/".join(context.module.path)] = (args, out)
            return out

        with nn.intercept_methods(record):
            model.apply(params, x, jnp.full(len(x), 0.3), train=False)

    def into(self, path: str, which: int = 0) -> jax.Array:
        return self[path][0][which]

    def out(self, path: str) -> jax.Array:
        return self[path][1]


def same(actual: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(actual, expected, atol=2e-6, rtol=1e-6)


def mean_of_2x2(x: jax.Array) -> jax.Array:
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def nearest(x: jax.Array) -> np.ndarray:
    return np.kron(x, np.ones((1, 2, 2, 1)))


def test_decoder_takes_the_encoders_features_last_first() -> None:
    calls = Calls({}, normal(1, 2, 8, 8, 3))
    skips = ["AttnBlockpp_0", f"{BLOCK}1", f"{BLOCK}0", "Conv_0"]
    below = [f"{BLOCK}4", f"{BLOCK}5", f"{BLOCK}7", f"{BLOCK}8"]
    for block, h, skip in zip((5, 6, 8, 9), below, skips, strict=True):
        joined = jnp.concatenate([calls.out(h), calls.out(skip)], -1)
        same(calls.into(f"{BLOCK}{block}"), joined)
    same(calls.into("AttnBlockpp_2"), calls.out(f"{BLOCK}6"))
    same(calls.into(f"{BLOCK}7"), calls.out("AttnBlockpp_2"))
    same(calls.out(""), calls.out("Conv_1"))


def test_biggan_blocks_resample_both_branches() -> None:
    calls = Calls({"nonlinearity": "lrelu"}, normal(1, 2, 8, 8, 3))
    for block, resample in ((1, mean_of_2x2), (7, nearest)):
        path = f"{BLOCK}{block}"
        normed = calls.out(f"{path}/GroupNorm_0")
        same(calls.into(f"{path}/Conv_0"), resample(np.where(normed > 0, normed, 0.2 * normed)))
        same(calls.into(f"{path}/Conv_2"), resample(calls.into(path)))
        both = calls.out(f"{path}/Conv_2") + calls.out(f"{path}/Conv_1")
        same(calls.out(path), both / np.sqrt(2))
    told = calls.out(f"{BLOCK}1/Conv_0") + calls.out(f"{BLOCK}1/Dense_0")[:, None, None]
    same(calls.into(f"{BLOCK}1/GroupNorm_1"), told)


def test_input_pyramid() -> None:
    x = normal(1, 2, 8, 8, 3)
    skip = Calls({"progressive_input": "input_skip", "progressive_combine": "cat"}, x)
    same(skip.into("Combine_0"), mean_of_2x2(x))
    same(skip.into("Combine_0", 1), skip.out(f"{BLOCK}1"))
    both = jnp.concatenate([skip.out("Combine_0/Conv_0"), skip.out(f"{BLOCK}1")], -1)
    same(skip.into(f"{BLOCK}2"), both)
    summed = Calls({"progressive_input": "input_skip"}, x)
    both = summed.out("Combine_0/Conv_0") + summed.out(f"{BLOCK}1")
    same(summed.into(f"{BLOCK}2"), both)
    carried = Calls({"progressive_input": "residual", "skip_rescale": False}, x)
    same(carried.into("Downsample_0"), x)
    same(carried.into(f"{BLOCK}2"), carried.out("Downsample_0") + carried.out(f"{BLOCK}1"))


def test_output_pyramid() -> None:
    x = normal(1, 2, 8, 8, 3)
    skip = Calls({"progressive": "output_skip"}, x)
    same(skip.into("GroupNorm_0"), skip.out("AttnBlockpp_2"))
    same(skip.out(""), nearest(skip.out("Conv_1")) + skip.out("Conv_2"))
    carried = Calls({"progressive": "residual"}, x)
    same(carried.into(f"{BLOCK}7"), carried.out("AttnBlockpp_2"))
    same(carried.into("Upsample_0"), carried.out("Conv_1"))
    both = carried.out("Upsample_0") + carried.out(f"{BLOCK}9")
    same(carried.into("GroupNorm_1"), both / np.sqrt(2))


def test_ddpm_blocks_resample_between_them() -> None:
    calls = Calls({"resblock_type": "ddpm", "resamp_with_conv": False}, normal(1, 2, 8, 8, 3))
    same(calls.into("Downsample_0"), calls.out("ResnetBlockDDPMpp_0"))
    same(calls.into("ResnetBlockDDPMpp_1"), mean_of_2x2(calls.into("Downsample_0")))
    same(calls.into("Upsample_0"), calls.out("AttnBlockpp_2"))
    same(calls.out("Upsample_0"), nearest(calls.into("Upsample_0")))
    both = calls.out("ResnetBlockDDPMpp_1/NIN_0") + calls.out("ResnetBlockDDPMpp_1/Conv_1")
    same(calls.out("ResnetBlockDDPMpp_1"), both / np.sqrt(2))


@pytest.mark.parametrize("progressive", ncsnpp.CHOICES["progressive"])
def test_untrained_network_predicts_no_noise(progressive: str) -> None:
    model, x = ncsnpp.Model(**SMALL, progressive=progressive), normal(1, 2, 8, 8, 3)
    out, _ = model.init_with_output(KEY, x, jnp.ones(2), train=False)
    assert 0 < jnp.abs(out).max() < 1e-3


def test_dropout_only_in_training_and_only_above_zero() -> None:
    x, label = normal(1, 2, 8, 8, 3), jnp.array([3.0, 700.0])
    model, still = ncsnpp.Model(**SMALL, dropout=0.5), ncsnpp.Model(**SMALL, dropout=0.0)
    params = perturbed(model, x)
    plain = model.apply(params, x, label, train=False)
    same(model.apply(params, x, label, train=False, rngs={"dropout": KEY}), plain)
    same(still.apply(params, x, label, train=True), plain)
    one, two, again = (
        model.apply(params, x, label, train=True, rngs={"dropout": jax.random.key(k)})
        for k in (1, 2, 1)
    )
    assert jnp.abs(one - plain).max() > 0.01 and jnp.abs(one - two).max() > 0.01
    same(again, one)


def test_only_a_conditional_network_sees_the_label() -> None:
    x, early, late = normal(1, 2, 8, 8, 3), jnp.array([1.0, 3.0]), jnp.array([600.0, 3.0])
    for conditional in (True, False):
        model = ncsnpp.Model(**SMALL, conditional=conditional)
        params = perturbed(model, x)
        change = model.apply(params, x, early, train=False) - model.apply(
            params, x, late, train=False
        )
        assert (jnp.abs(change[0]).max() > 0.01) == conditional
        assert jnp.abs(change[1]).max() < 1e-6


def test_bfloat16_computes_close_to_float32() -> None:
    given = reference.load()
    model = ncsnpp.Model(**reference.OPTIONS, dtype="bfloat16")
    out = model.apply({"params": given.params}, given.x[:2], 999 * given.t[:2], train=False)
    assert out.dtype == jnp.float32
    error = np.sqrt(np.mean((out - given.network[:2]) ** 2) / np.mean(given.network[:2] ** 2))
    assert 1e-4 < error < 0.03


BAD_OPTIONS = [
    ({"embedding_type": "cosine"}, "embedding_type='cosine'.*positional, fourier"),
    ({"resblock_type": "resnet"}, "resblock_type='resnet'.*ddpm, biggan"),
    ({"progressive": "input_skip"}, "progressive='input_skip'.*none, output_skip, residual"),
    ({"progressive_input": "x"}, "progressive_input='x'.*none, input_skip, residual"),
    ({"progressive_combine": "add"}, "progressive_combine='add'.*sum, cat"),
    ({"nonlinearity": "gelu"}, "nonlinearity='gelu'.*swish, elu, relu, lrelu"),
    ({"dtype": "float16"}, "dtype='float16'.*float32, bfloat16"),
    ({"dropout": 1.0}, r"dropout=1.0.*\[0, 1\)"),
    ({"nf": 2}, "nf=2.*at least 4"),
    ({"ch_mult": ()}, r"ch_mult=\(\)"),
    ({"num_res_blocks": 0}, "num_res_blocks=0"),
    ({"fir_kernel": (1, -1)}, r"fir_kernel=\(1, -1\)"),
    ({"fourier_scale": 0.0}, "fourier_scale=0.0"),
]
BAD_INPUTS: list[tuple[dict, tuple[int, ...], str]] = [
    ({}, (2, 9, 8, 3), "9x8.*multiple of 2"),
    ({}, (2, 8, 8), r"\(2, 8, 8\).*\(n, h, w, c\)"),
    ({"attn_resolutions": (16,)}, (2, 8, 8, 3), r"\(16,\).*\[8, 4\]"),
    ({"nf": 10}, (2, 8, 8, 3), "c=10 channels"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_option_is_an_error_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ncsnpp.Model(**options)


@pytest.mark.parametrize(("options", "shape", "message"), BAD_INPUTS)
def test_bad_input_is_an_error(options: dict, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(ncsnpp.Model(**SMALL | options), shape)


def test_input_unlike_the_parameters_is_an_error() -> None:
    model = ncsnpp.Model(**SMALL)
    params = model.init(KEY, jnp.zeros((1, 8, 8, 3)), jnp.ones(1), train=False)
    with pytest.raises(ValueError, match=r"1 channels.*made for 3"):
        model.apply(params, jnp.zeros((1, 8, 8, 1)), jnp.ones(1), train=False)
    with pytest.raises(ValueError, match=r"label of shape \(2,\)"):
        model.apply(params, jnp.zeros((1, 8, 8, 3)), jnp.ones(2), train=False)
    with pytest.raises(ValueError, match=r"uint8.*\[-1, 1\]"):
        model.apply(params, jnp.zeros((1, 8, 8, 3), "uint8"), jnp.ones(1), train=False)


# ---- NCSN++: the layers -------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 36, 160])
def test_group_norm_equals_the_definition(channels: int) -> None:
    x = 3 * normal(1, 2, 6, 5, channels) + 30 * normal(2, 1, 1, 1, channels)
    scale, bias = normal(3, channels), normal(4, channels)
    out = layers.GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    grouped = np.asarray(x, float).reshape(2, 6, 5, min(channels // 4, 32), -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    unit = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, unit.reshape(x.shape) * scale + bias, atol=1e-5)


def test_group_norm_of_bfloat16_keeps_float32_statistics() -> None:
    x = (1 + 0.1 * normal(1, 2, 32, 32, 8)).astype(jnp.bfloat16)
    norm = nn.GroupNorm(2, dtype=jnp.float32, use_bias=False, use_scale=False)
    expected = norm.apply({}, x.astype(jnp.float32))
    params = {"scale": jnp.ones(8), "bias": jnp.zeros(8)}
    out = layers.GroupNorm().apply({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=1e-3, rtol=2**-8)


def test_attention_equals_the_definition() -> None:
    x, block = normal(1, 2, 3, 4, 8), ncsnpp.AttnBlockpp(init_scale=1.0, skip_rescale=True)
    params = block.init(KEY, x)["params"]
    normed = layers.GroupNorm().apply({"params": params["GroupNorm_0"]}, x)
    flat = np.asarray(normed, float).reshape(2, 12, 8)
    q, k, v = (flat @ params[f"NIN_{i}"]["W"] for i in range(3))
    logits = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
    mixed = logits / logits.sum(-1, keepdims=True) @ v @ params["NIN_3"]["W"]
    expected = (x + mixed.reshape(x.shape)) / np.sqrt(2)
    np.testing.assert_allclose(block.apply({"params": params}, x), expected, atol=2e-6)


def test_embeddings_equal_the_definition() -> None:
    label = jnp.array([0.01, 3.0, 999.0])
    k = np.arange(4)
    angle = np.asarray(label, float)[:, None] * 10000 ** (-k / 3)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    np.testing.assert_allclose(layers.positional(label, 8), expected, atol=1e-4)
    w = normal(1, 4)
    project = layers.GaussianFourierProjection(4, 16.0)
    out, gradient = jax.value_and_grad(
        lambda p: project.apply({"params": p}, jnp.log(label))[1].sum()
    )({"W": w})
    angle = 2 * np.pi * np.log(3) * np.asarray(w, float)
    np.testing.assert_allclose(out, np.sum(np.sin(angle) + np.cos(angle)), atol=1e-4)
    np.testing.assert_array_equal(gradient["W"], 0)
    made = layers.GaussianFourierProjection(20_000, 16.0).init(KEY, label)["params"]["W"]
    assert abs(made.std() / 16 - 1) < 5 / np.sqrt(2 * 20_000)


def test_initial_weights_have_variance_scale_over_average_fan() -> None:
    made = layers.fan_avg(0.1)(KEY, (3, 3, 40, 60))
    limit = np.sqrt(3 * 0.1 / (9 * (40 + 60) / 2))
    assert 0.999 * limit < jnp.abs(made).max() <= limit
    assert abs(made.std() / (limit / np.sqrt(3)) - 1) < 0.02
    assert 0 < jnp.abs(layers.fan_avg(0.0)(KEY, (8, 8))).max() < 1e-5


def test_pixelwise_convolution_is_a_convolution() -> None:
    class One(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return layers.conv(x, 5, 1)

    x = normal(1, 2, 3, 4, 8)
    variables = One().init(KEY, x)
    same(
        One().apply(variables, x),
        nn.Conv(5, (1, 1)).apply({"params": variables["params"]["Conv_0"]}, x),
    )


def stuffed(x: np.ndarray) -> np.ndarray:
    out = np.zeros((x.shape[0] * 2, x.shape[1] * 2))
    out[::2, ::2] = x
    return out


KERNELS = [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1, 2, 5, 3, 1, 0.5)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_fir_resampling_equals_a_convolution(kernel: tuple[float, ...]) -> None:
    x = normal(1, 1, 6, 8, 2)
    k, plane = np.outer(kernel, kernel) / np.sum(kernel) ** 2, np.asarray(x, float)[0, ..., 1]
    size = len(kernel)

    def padded(image: np.ndarray, excess: int, before: int) -> np.ndarray:
        return np.pad(image, (before, excess - before))

    ahead = (size - 1) // 2 + 1
    up = scipy.signal.convolve2d(padded(stuffed(plane), size - 1, ahead), 4 * k, "valid")
    np.testing.assert_allclose(layers.upsample(x, kernel)[0, ..., 1], up, atol=1e-6)
    ahead = (size - 1) // 2
    down = scipy.signal.convolve2d(padded(plane, size - 2, ahead), k, "valid")[::2, ::2]
    np.testing.assert_allclose(layers.downsample(x, kernel)[0, ..., 1], down, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize("up", [True, False])
def test_fir_convolution_equals_scipy(up: bool, kernel: tuple[float, ...]) -> None:
    x = normal(1, 1, 6, 8, 2)
    layer = layers.Conv2d(3, kernel, up=up)
    w = np.asarray(normal(2, 3, 3, 2, 3), float)
    out = layer.apply({"params": {"weight": w, "bias": jnp.ones(3)}}, x)
    k, size = np.outer(kernel, kernel) / np.sum(kernel) ** 2, len(kernel)
    expected = np.ones(out.shape[1:])
    for c in range(2):
        plane = np.asarray(x, float)[0, ..., c]
        for d in range(3):
            if up:  # transposed convolution, then the filter
                wide = scipy.signal.correlate2d(stuffed(plane)[:-1, :-1], w[:, :, c, d], "full")
                pad = ((size - 3) // 2 + 1, (size - 4) // 2 + 1)
                expected[..., d] += scipy.signal.convolve2d(np.pad(wide, pad), 4 * k, "valid")
            else:  # the filter, then a strided convolution
                pad = ((size + 1) // 2, size // 2)
                smooth = scipy.signal.convolve2d(np.pad(plane, pad), k, "valid")
                full = scipy.signal.correlate2d(smooth, w[:, :, c, d], "valid")
                expected[..., d] += full[::2, ::2]
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


def test_fir_resampling_keeps_a_constant_image_away_from_the_border() -> None:
    x = jnp.full((1, 8, 8, 1), 0.7)
    same(layers.upsample(x, (1, 3, 3, 1))[:, 2:-2, 2:-2], jnp.full((1, 12, 12, 1), 0.7))
    same(layers.downsample(x, (1, 3, 3, 1))[:, 1:-1, 1:-1], jnp.full((1, 2, 2, 1), 0.7))


# ---- the multilayer perceptron ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (4, 4, 1)])
@pytest.mark.parametrize("kind", layers.EMBEDDINGS)
def test_mlp_fits_any_event_and_starts_at_zero(kind: str, shape: tuple[int, ...]) -> None:
    model = mlp.Model(width=16, depth=2, embedding_size=8, embedding_type=kind)
    x, label = normal(1, 3, *shape), jnp.array([0.1, 0.1, 5.0])
    params = perturbed(model, x)
    out = model.apply(params, x, label, train=True)
    assert (out.shape, out.dtype) == (x.shape, jnp.dtype("float32"))
    made, _ = model.init_with_output(KEY, x, label, train=False)
    np.testing.assert_array_equal(made, 0)
    moved = model.apply(params, x, label.at[0].set(5.0), train=False) - out
    assert jnp.abs(moved[0]).max() > 1e-3 and jnp.abs(moved[1:]).max() < 1e-6


def test_mlp_width_depth_and_precision() -> None:
    # Two maps of 32 wide and the label's, three maps and a norm a block, the output's.
    count = 5 * 32 + 9 * 32 + 2 * (3 * 33 * 32 + 2 * 32) + 33 * 4
    tree = shapes(mlp.Model(width=32, depth=2, embedding_size=8), (1, 4))
    assert sum(np.prod(shape, dtype=int) for shape in tree.values()) == count
    exact, rough = mlp.Model(width=32), mlp.Model(width=32, dtype="bfloat16")
    x, label = normal(1, 3, 4), jnp.array([0.1, 0.4, 5.0])
    params = perturbed(exact, x)
    out, close = (m.apply(params, x, label, train=False) for m in (exact, rough))
    assert close.dtype == jnp.float32
    assert 1e-4 < jnp.abs(close - out).max() / jnp.abs(out).max() < 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_type": "rotary"}, "embedding_type='rotary'.*positional, fourier"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"embedding_size": 7}, "embedding_size=7"),
        ({"width": 0}, "width=0"),
        ({"depth": -1}, "depth=-1"),
        ({"fourier_scale": 0.0}, "fourier_scale=0.0"),
    ],
)
def test_bad_mlp_option_is_an_error_at_once(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mlp.Model(**options)


def test_mlp_wants_a_label_an_example() -> None:
    with pytest.raises(ValueError, match=r"label of shape \(1,\)"):
        mlp.Model().init(KEY, jnp.zeros((2, 3)), jnp.ones(1), train=False)
