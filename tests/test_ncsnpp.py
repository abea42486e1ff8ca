"""NCSN++: numbers of parameters, outputs of the original code, and connections between layers."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import linen as nn
from flax.traverse_util import flatten_dict
from linen import KEY, normal, random_params, same, shapes

from sbml.networks import _layers as layers
from sbml.networks import ncsnpp

SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
TINY = {"nf": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()}


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


def test_output_equals_the_original_code() -> None:
    case = reference.load()
    model = ncsnpp.Model(**reference.OPTIONS)
    tree = shapes(model, case.x.shape)
    assert tree == {k: v.shape for k, v in flatten_dict(case.params, sep="/").items()}
    apply = jax.jit(lambda x, label: model.apply({"params": case.params}, x, label, train=False))
    np.testing.assert_allclose(apply(case.x, 999 * case.t), case.network, atol=1e-5, rtol=0)
    # An image's result does not depend on the others of its batch.
    others = apply(case.x[[1, 1, 1, 0]], 999 * case.t[[1, 1, 1, 0]])
    np.testing.assert_allclose(others, case.network[[1, 1, 1, 0]], atol=1e-5, rtol=0)


# Options, weights that appear or change their shape, and modules that disappear, compared with the
# network SMALL on 8x8 images. SMALL has 8 channels at 8x8 and 16 at 4x4. Its blocks: 0 encodes,
# 1 halves the image, 2 encodes, 3 and 4 are in the middle, 5 and 6 decode, 7 doubles, 8 and 9
# decode.
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
# The same for "ddpm" blocks, which do not resample: there are no blocks 1 and 7, and the doubling
# follows the sixth block.
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
    """Shapes of all parameters but the biases; asserts that every layer has its bias."""
    tree = shapes(model, (2, 8, 8, 3))
    biases = {path for path in tree if path.split("/")[-1] in ("bias", "b")}
    kept = {path: shape for path, shape in tree.items() if path not in biases}
    owners = {path.rpartition("/")[0] for path in kept} - {"GaussianFourierProjection_0"}
    assert owners == {path.rpartition("/")[0] for path in biases}
    return kept


@pytest.mark.slow
@pytest.mark.parametrize(("options", "added", "gone"), TREES)
def test_tree_of_each_option(options: dict, added: dict, gone: set[str]) -> None:
    plain = weights(ncsnpp.Model(**SMALL))
    left = {k: v for k, v in plain.items() if not any(k.startswith(f"{g}/") for g in gone)}
    assert all(any(k.startswith(f"{g}/") for k in plain) for g in gone)
    assert weights(ncsnpp.Model(**SMALL | options)) == left | added


@pytest.mark.parametrize(("options", "added"), DDPM)
def test_tree_of_ddpm_blocks(options: dict, added: dict) -> None:
    tree = weights(ncsnpp.Model(**SMALL | options | {"resblock_type": "ddpm"}))
    inside = {k: v for k, v in tree.items() if k.startswith("Resnet")}
    around = {k: v for k, v in tree.items() if not k.startswith(("Resnet", "Attn", "Dense"))}
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


class Calls(dict):
    """Path of a module -> the arrays it was called with and what it returned."""

    def __init__(self, **options: Any):
        model, x = ncsnpp.Model(**SMALL | options), normal(1, 2, 8, 8, 3)

        @jax.jit
        def recorded(params: dict) -> dict:
            calls = {}

            def record(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
                out = call(*args, **kwargs)
                if context.method_name == "__call__":
                    calls["/".join(context.module.path)] = (args[:2], out)
                return out

            with nn.intercept_methods(record):
                model.apply(params, x, jnp.full(len(x), 0.3), train=False)
            return {k: v for k, v in calls.items() if "Dropout" not in k}

        super().__init__(recorded(random_params(model, x.shape)))

    def into(self, path: str, which: int = 0) -> jax.Array:
        return self[path][0][which]

    def out(self, path: str) -> jax.Array:
        return self[path][1]


def mean_of_2x2(x: jax.Array) -> jax.Array:
    return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


def nearest(x: jax.Array) -> np.ndarray:
    return np.kron(x, np.ones((1, 2, 2, 1)))


@pytest.mark.slow
def test_blocks_and_skips() -> None:
    calls = Calls(nonlinearity="lrelu")
    skips = ["AttnBlockpp_0", f"{BLOCK}1", f"{BLOCK}0", "Conv_0"]
    below = [f"{BLOCK}4", f"{BLOCK}5", f"{BLOCK}7", f"{BLOCK}8"]
    for block, h, skip in zip((5, 6, 8, 9), below, skips, strict=True):
        joined = jnp.concatenate([calls.out(h), calls.out(skip)], -1)
        same(calls.into(f"{BLOCK}{block}"), joined)
    same(calls.into("AttnBlockpp_2"), calls.out(f"{BLOCK}6"))
    same(calls.into(f"{BLOCK}7"), calls.out("AttnBlockpp_2"))
    same(calls.out(""), calls.out("Conv_1"))
    for block, resample in ((1, mean_of_2x2), (7, nearest)):
        path = f"{BLOCK}{block}"
        normed = calls.out(f"{path}/GroupNorm_0")
        same(calls.into(f"{path}/Conv_0"), resample(np.where(normed > 0, normed, 0.2 * normed)))
        same(calls.into(f"{path}/Conv_2"), resample(calls.into(path)))
        embedded = calls.out(f"{path}/Conv_0") + calls.out(f"{path}/Dense_0")[:, None, None]
        same(calls.into(f"{path}/GroupNorm_1"), embedded)
        both = calls.out(f"{path}/Conv_2") + calls.out(f"{path}/Conv_1")
        same(calls.out(path), both / np.sqrt(2))


# With three levels, blocks 1 and 3 halve the image, 4 encodes at the lowest level, 5 and 6 are in
# the middle, 7 and 8 decode, 9 doubles, 10 and 11 decode, 12 doubles, 13 and 14 decode.
@pytest.mark.slow
def test_summed_pyramids_of_three_levels() -> None:
    calls = Calls(ch_mult=(1, 2, 2), progressive="output_skip", progressive_input="input_skip")
    quarter = mean_of_2x2(mean_of_2x2(calls.into("")))
    same(calls.into("Combine_0"), mean_of_2x2(calls.into("")))
    same(calls.into("Combine_1"), quarter)
    for combine, halve, after in ((0, 1, 2), (1, 3, 4)):
        same(calls.into(f"Combine_{combine}", 1), calls.out(f"{BLOCK}{halve}"))
        both = calls.out(f"Combine_{combine}/Conv_0") + calls.out(f"{BLOCK}{halve}")
        same(calls.into(f"{BLOCK}{after}"), both)
    for head, features in enumerate((f"{BLOCK}8", "AttnBlockpp_2", f"{BLOCK}14")):
        same(calls.into(f"GroupNorm_{head}"), calls.out(features))
    total = nearest(nearest(calls.out("Conv_1")) + calls.out("Conv_2")) + calls.out("Conv_3")
    same(calls.out(""), total)


@pytest.mark.slow
@pytest.mark.parametrize("rescale", [True, False])
def test_carried_pyramids_of_three_levels(rescale: bool) -> None:
    carried = {"progressive": "residual", "progressive_input": "residual"}
    calls = Calls(ch_mult=(1, 2, 2), skip_rescale=rescale, **carried)
    root = np.sqrt(2) if rescale else 1
    same(calls.into("Downsample_0"), calls.into(""))
    half = (calls.out("Downsample_0") + calls.out(f"{BLOCK}1")) / root
    same(calls.into(f"{BLOCK}2"), half)
    same(calls.into("Downsample_1"), half)
    quarter = (calls.out("Downsample_1") + calls.out(f"{BLOCK}3")) / root
    same(calls.into(f"{BLOCK}4"), quarter)
    same(calls.into(f"{BLOCK}9"), calls.out(f"{BLOCK}8"))
    same(calls.into("Upsample_0"), calls.out("Conv_1"))
    half = (calls.out("Upsample_0") + calls.out("AttnBlockpp_2")) / root
    same(calls.into(f"{BLOCK}12"), half)
    same(calls.into("Upsample_1"), half)
    whole = (calls.out("Upsample_1") + calls.out(f"{BLOCK}14")) / root
    same(calls.into("GroupNorm_1"), whole)
    same(calls.out(""), calls.out("Conv_2"))
    both = calls.out(f"{BLOCK}2/Conv_2") + calls.out(f"{BLOCK}2/Conv_1")
    same(calls.out(f"{BLOCK}2"), both / root)


@pytest.mark.slow
def test_ddpm_blocks_and_concatenated_pyramid() -> None:
    calls = Calls(
        resblock_type="ddpm",
        resamp_with_conv=False,
        progressive_input="input_skip",
        progressive_combine="cat",
    )
    block = "ResnetBlockDDPMpp_"
    same(calls.into("Downsample_0"), calls.out(f"{block}0"))
    same(calls.out("Downsample_0"), mean_of_2x2(calls.into("Downsample_0")))
    both = jnp.concatenate([calls.out("Combine_0/Conv_0"), calls.out("Downsample_0")], -1)
    same(calls.into(f"{block}1"), both)
    same(calls.into("Upsample_0"), calls.out("AttnBlockpp_2"))
    same(calls.out("Upsample_0"), nearest(calls.into("Upsample_0")))
    both = calls.out(f"{block}4/NIN_0") + calls.out(f"{block}4/Conv_1")
    same(calls.out(f"{block}4"), both / np.sqrt(2))


@pytest.mark.parametrize("kind", ["ddpm", "biggan"])
def test_init_scale_applies_to_the_last_layer_of_each_branch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def filled(scale: float = 1.0) -> Callable:
        return lambda key, shape, dtype="float32": np.full(shape, scale, dtype)

    monkeypatch.setattr(layers, "fan_avg", filled)
    options = {"resblock_type": kind, "progressive": "residual", "init_scale": 0.25}
    model = ncsnpp.Model(**SMALL | options)
    init = jax.jit(lambda: model.init(KEY, normal(1, 1, 8, 8, 3), jnp.ones(1), train=False))
    tree = jax.device_get(init())
    scales = {
        path: float(leaf.ravel()[0])
        for path, leaf in flatten_dict(tree["params"], sep="/").items()
        if path.endswith(("kernel", "W"))
    }
    branches = re.compile("Resnet.*/Conv_1/|Attn.*/NIN_3/|Conv_2/kernel")
    for path, scale in scales.items():
        shortcut = 0.1 if "NIN" in path else 1.0
        assert scale == pytest.approx(0.25 if branches.match(path) else shortcut), path


@pytest.mark.parametrize("conditional", [True, False])
def test_only_a_conditional_network_sees_the_label(conditional: bool) -> None:
    x, model = normal(1, 2, 4, 4, 3), ncsnpp.Model(**TINY, conditional=conditional)
    params = random_params(model, x.shape)
    apply = jax.jit(lambda label: model.apply(params, x, label, train=False))
    moved = np.abs(np.subtract(*(apply(np.float32([t, 3])) for t in (1, 600))))
    assert (moved[0].max() > 0.01) == conditional
    assert moved[1].max() < 1e-6


@pytest.mark.slow
def test_bfloat16_computes_close_to_float32() -> None:
    case = reference.load()
    model = ncsnpp.Model(**reference.OPTIONS, dtype="bfloat16")
    apply = jax.jit(lambda x, label: model.apply({"params": case.params}, x, label, train=False))
    out = apply(case.x, 999 * case.t)
    assert out.dtype == jnp.float32
    error = np.sqrt(np.mean((out - case.network) ** 2) / np.mean(case.network**2))
    assert 1e-4 < error < 0.03
