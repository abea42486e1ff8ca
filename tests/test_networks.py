"""The registry of networks, the contract of a network, errors for bad options, and the MLP."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import errors
from flax import linen as nn
from linen import normal, random_params, same, shapes, size

from sbml import networks
from sbml.networks import mlp, ncsnpp


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@functools.partial(jax.jit, static_argnums=0)
def apply(model: nn.Module, variables: dict, x: jax.Array, label: jax.Array) -> jax.Array:
    return model.apply(variables, x, label, train=False)


@pytest.mark.parametrize(
    "name",
    [
        name if name == "mlp" else pytest.param(name, marks=pytest.mark.slow)
        for name in networks.NETWORKS
    ],
)
def test_every_network_keeps_the_contract(name: str) -> None:
    model = networks.NETWORKS[name]()
    assert hash(model) == hash(networks.NETWORKS[name]())
    assert size(shapes(model, (2, 32, 32, 3))) > 0


SMALL = {"nf": 8, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (4,)}
UNET2D = {
    "block_out_channels": (32,),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D",),
    "mid_block_type": "none",
    "up_block_types": ("UpBlock2D",),
}


@pytest.mark.slow
def test_only_the_first_convolution_reads_the_fourier_features() -> None:
    """If their weights are zero, the output is that of the network without them; the input pyramid
    does not read them."""
    options = {**SMALL, "progressive_input": "residual"}
    plain, model = ncsnpp.Model(**options), ncsnpp.Model(**options, fourier=(8.0, 16.0))
    params = random_params(model, (1, 8, 8, 3))["params"]
    kernel = params["Conv_0"]["kernel"]
    assert kernel.shape == (3, 3, 15, 8)
    x, label = normal(1, 2, 8, 8, 3), np.float32([3.0, 40.0])

    @functools.partial(jax.jit, static_argnums=0)
    def out(model: ncsnpp.Model, kernel: jax.Array) -> jax.Array:
        variables = {"params": {**params, "Conv_0": {**params["Conv_0"], "kernel": kernel}}}
        return model.apply(variables, x, label, train=False)

    unweighted = np.concatenate([kernel[:, :, :3], 0 * kernel[:, :, 3:]], axis=2)
    expected = out(plain, kernel[:, :, :3])
    np.testing.assert_allclose(out(model, unweighted), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(np.subtract(out(model, kernel), expected)).max() > 1e-2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"width": 8, "depth": 1}),
        pytest.param(
            "ncsnpp",
            {"nf": 4, "ch_mult": (1,), "num_res_blocks": 1, "attn_resolutions": ()},
            marks=pytest.mark.slow,
        ),
        pytest.param("vdm", {"width": 8, "depth": 0}, marks=pytest.mark.slow),
        pytest.param("unet2d", UNET2D, marks=pytest.mark.slow),
    ],
)
def test_dropout_acts_in_training_alone_and_remat_changes_nothing(name: str, options: dict) -> None:
    model = networks.NETWORKS[name](**options, dropout=0.5)
    variables = random_params(model, (2, 4, 4, 3))
    x, label = normal(1, 2, 4, 4, 3), np.float32([3.0, 700.0])

    @functools.partial(jax.jit, static_argnames=("model", "train"))
    def result(model: nn.Module, seed: int | None, train: bool = True) -> jax.Array:
        """The output, and the gradient of its squares."""
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}

        def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
            out = model.apply(variables, x, label, train=train, rngs=rngs)
            return jnp.sum(out**2), out

        gradient, out = jax.grad(loss, has_aux=True)(x)
        return jnp.stack([out, gradient])

    plain, one, two = jax.device_get(
        (result(model, None, train=False), result(model, 1), result(model, 2))
    )
    same(result(model.clone(dropout=0.0), None), plain)
    assert np.abs(one - plain).max() > 1e-3 and np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(result(model, 1), one)
    if name != "mlp":  # It stores too little for recomputing to pay.
        np.testing.assert_allclose(result(model.clone(remat=True), 1), one, rtol=1e-4, atol=1e-5)
    with pytest.raises(errors.InvalidRngError):
        jax.eval_shape(lambda: model.apply(variables, x, label, train=True))


def test_input_unlike_the_parameters_is_an_error() -> None:
    model = ncsnpp.Model(**SMALL)
    params = random_params(model, (1, 8, 8, 3))
    x, label = np.zeros((1, 8, 8, 3), np.float32), np.ones(1, np.float32)
    with pytest.raises(ValueError, match=r"1 channels.*made for 3"):
        model.apply(params, x[..., :1], label, train=False)
    with pytest.raises(ValueError, match=r"label is .* of shape \(2,\)"):
        model.apply(params, x, np.ones(2, np.float32), train=False)
    with pytest.raises(ValueError, match="x is uint8 .* give floating-point numbers"):
        model.apply(params, x.astype(np.uint8), label, train=False)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [  # The quick tests have each kind and each shape once.
        pytest.param(kind, shape, marks=() if i == j else pytest.mark.slow)
        for i, kind in enumerate(("positional", "fourier", "fourier_linear"))
        for j, shape in enumerate(((), (2,), (4, 4, 1)))
    ],
)
def test_mlp_takes_any_shape_and_starts_at_zero(kind: str, shape: tuple[int, ...]) -> None:
    model = mlp.Model(width=16, depth=2, embedding_size=8, embedding_type=kind)
    x, label, other = normal(1, 3, *shape), np.float32([0.1, 0.1, 5]), np.float32([5, 0.1, 5])
    params = random_params(model, x.shape)

    @jax.jit
    def outs() -> list[jax.Array]:
        initial, _ = model.init_with_output(jax.random.key(0, impl="rbg"), x, label, train=False)
        out = model.apply(params, x, label, train=True)
        return [initial, out, model.apply(params, x, other, train=False)]

    initial, out, moved = jax.device_get(outs())
    assert (out.shape, out.dtype) == (x.shape, jnp.dtype("float32"))
    np.testing.assert_array_equal(initial, 0)
    change = np.abs(moved - out)
    assert change[0].max() > 1e-3 and change[1:].max() < 1e-6


def test_mlp_width_depth_and_precision() -> None:
    # The input's map, the label's map, three maps and a norm in each of two blocks, the last map.
    count = 5 * 32 + 9 * 32 + 2 * (3 * 33 * 32 + 2 * 32) + 33 * 4
    tree = shapes(mlp.Model(width=32, depth=2, embedding_size=8), (1, 4))
    assert size(tree) == count
    exact, rough = mlp.Model(width=32), mlp.Model(width=32, dtype="bfloat16")
    x, label = normal(1, 3, 4), np.float32([0.1, 0.4, 5.0])
    params = random_params(exact, x.shape)
    out, close = (np.asarray(apply(m, params, x, label)) for m in (exact, rough))
    assert close.dtype == jnp.float32
    assert 1e-4 < np.abs(close - out).max() / np.abs(out).max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ncsnpp", SMALL),
        ("ncsnpp", SMALL | {"progressive": "output_skip"}),
        ("ncsnpp", SMALL | {"progressive": "residual"}),
        ("vdm", {"width": 8, "depth": 1}),
        ("unet2d", UNET2D),
        ("mlp", {"width": 8, "depth": 1}),
    ],
)
def test_several_outputs_have_the_digits_of_float32(name: str, options: dict) -> None:
    def rounded(outputs: int) -> float:
        """The part of the network's outputs that bfloat16 represents exactly."""
        model = networks.NETWORKS[name](**options, dtype="bfloat16", outputs=outputs)
        x, label = normal(1, 2, 8, 8, 1), np.float32([0.1, 0.4])
        out = model.apply(random_params(model, x.shape), x, label, train=False)
        assert out.dtype == jnp.float32
        return float(jnp.mean(out == out.astype(jnp.bfloat16)))

    assert rounded(0) == 1
    assert rounded(3) < 0.1


def test_mlp_reads_fourier_features_of_its_input() -> None:
    """If x changes by a period of the features, the output changes as it does without them."""
    plain, model = mlp.Model(width=16, depth=0), mlp.Model(width=16, depth=0, fourier=(8.0, 16.0))
    x, label = normal(1, 3, 4), np.float32([0.1, 0.4, 5.0])
    variables = random_params(model, x.shape)
    first = variables["params"]["Dense_1"]["kernel"]
    assert first.shape == (4 * 5, 16)
    without = {**variables["params"], "Dense_1": {**variables["params"]["Dense_1"]}}
    without["Dense_1"]["kernel"] = first[:4]

    def moved(model: mlp.Model, params: dict, shift: float) -> np.ndarray:
        outs = [apply(model, {"params": params}, np.float32(x + s), label) for s in (0.0, shift)]
        return np.subtract(outs[1], outs[0])

    expected = moved(plain, without, 0.25)
    np.testing.assert_allclose(moved(model, variables["params"], 0.25), expected, atol=1e-4)
    gap = moved(model, variables["params"], 0.1) - moved(plain, without, 0.1)
    assert np.abs(gap).max() > 0.1
