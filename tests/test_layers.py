"""Layers of the networks, compared with their definitions in float64 by NumPy and SciPy."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax import linen as nn
from linen import KEY, normal, random_params, same

from sbml.networks import _layers as layers
from sbml.networks import ncsnpp

dropout = jax.jit(layers.dropout, static_argnums=2)


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("channels", [8, 36, 160])
def test_group_norm_equals_the_definition(channels: int) -> None:
    x = 3 * normal(1, 2, 6, 5, channels) + 30 * normal(2, 1, 1, 1, channels)
    scale, bias = np.asarray(normal(3, channels)), np.asarray(normal(4, channels))
    out = layers.GroupNorm().apply({"params": {"scale": scale, "bias": bias}}, x)
    grouped = np.asarray(x, float).reshape(2, 6, 5, min(channels // 4, 32), -1)
    centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
    unit = centred / np.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-6)
    np.testing.assert_allclose(out, unit.reshape(x.shape) * scale + bias, atol=1e-5)


def test_group_norm_of_bfloat16_keeps_float32_statistics() -> None:
    x = (1 + 0.1 * normal(1, 2, 32, 32, 8)).astype(jnp.bfloat16)
    norm = nn.GroupNorm(2, dtype=jnp.float32, use_bias=False, use_scale=False)
    expected = jax.jit(norm.apply)({}, x.astype(np.float32))
    params = {"scale": np.ones(8), "bias": np.zeros(8)}
    out = jax.jit(layers.GroupNorm().apply)({"params": params}, x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), expected, atol=1e-3, rtol=2**-8)


@pytest.mark.parametrize("channels", [1, 6, 7])
def test_dropout_drops_at_its_rate_and_keeps_the_mean(channels: int) -> None:
    n, rate = 60_000 // channels, 0.3
    x = np.tile(1 + np.arange(channels), (n, 1)).astype(np.float32)
    out = np.asarray(dropout(KEY, x, rate))
    kept = out != 0
    np.testing.assert_allclose(out[kept], x[kept] / (1 - rate), rtol=2e-5)
    assert (np.abs(kept.mean(0) - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)).all()
    if channels > 1:  # Two elements take their bits from one random word, but are independent.
        noise = np.corrcoef(kept, rowvar=False) - np.eye(channels)
        assert np.abs(noise).max() < 5 / np.sqrt(n)


def test_dropout_scales_by_its_rounded_rate() -> None:
    ones = np.ones(1000, np.float32)
    assert np.asarray(dropout(KEY, ones, 1 - 2**-20)).max() in (0, 2**16)
    np.testing.assert_array_equal(dropout(KEY, ones, 2**-20), 1)
    assert dropout(KEY, ones.astype(jnp.bfloat16), 0.1).dtype == jnp.bfloat16


@pytest.mark.slow
def test_a_residual_gradient_is_computed_once() -> None:
    """In the compiled gradient, no fusion contains the gradients of many blocks.

    Without ``materialise``, XLA computes them again in every block, in one large fusion."""
    model = ncsnpp.Model(nf=8, ch_mult=(1,), num_res_blocks=4, attn_resolutions=(), dropout=0.0)
    x, label = normal(1, 2, 4, 4, 1), jnp.ones(2)
    params = random_params(model, x.shape)

    def largest_fusion() -> int:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(model.apply(params, x, label, train=True) ** 2)

        text = jax.jit(jax.grad(loss)).lower(params).compile().as_text()
        return max(body.count("\n") for body in text.split("\n\n") if "%fused" in body[:60])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "one_cpu", lambda: False)
        plain = largest_fusion()
    assert largest_fusion() < plain / 2


@pytest.mark.usefixtures("x64")
def test_materialise_changes_no_value_and_no_derivative() -> None:
    """This is tested in forward and reverse mode, under ``vmap``, for second derivatives in both
    orders of the modes, and with ``jax.checkpoint``. Only a NaN in the first entry of ``x`` changes
    the gradient."""
    x, v, a = normal(1, 2, 3, 4), normal(2, 2, 3, 4), normal(3, 1, 1, 4)

    @functools.partial(jax.jit, static_argnums=0)
    def forms(
        materialise: Callable[[jax.Array], jax.Array], a: jax.Array, x: jax.Array
    ) -> list[Any]:
        def field(a: jax.Array, x: jax.Array) -> jax.Array:
            h = materialise(jnp.tanh(x) * a)
            return materialise(h + jnp.sin(materialise(h * a)))

        def total(a: jax.Array, x: jax.Array) -> jax.Array:
            return jnp.sum(v[: len(x)] * field(a, x) ** 2)

        def directional(a: jax.Array) -> jax.Array:
            return jnp.sum(v * jax.jvp(lambda x: field(a, x), (x,), (v,))[1])

        return [
            field(a, x),
            jax.jvp(field, (a, x), (2 * a, v)),
            jax.grad(total, argnums=(0, 1))(a, x),
            jax.vmap(jax.grad(lambda a, x: total(a, x[None])), (None, 0))(a, x),
            jax.vmap(lambda v: jax.jvp(lambda x: field(a, x), (x,), (v,)))(jnp.stack([v, x])),
            jax.grad(lambda a: jnp.sum(jax.vmap(field, (None, 0))(a, x) ** 2))(a[0]),
            jax.grad(directional)(a),
            jax.hessian(total)(a, x),
            jax.jacrev(jax.jacrev(total))(a, x),
            jax.jit(jax.grad(jax.checkpoint(total)))(a, x),
        ]

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12),
        forms(layers.materialise, a, x),
        forms(lambda x: x, a, x),
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(v * layers.materialise(x))))
    np.testing.assert_array_equal(gradient(x), v)
    x[0, 0, 0] = np.nan
    assert np.isnan(gradient(x)).all()


def test_attention_equals_the_definition() -> None:
    x, block = normal(1, 2, 3, 4, 8), ncsnpp.AttnBlockpp(np.sqrt(2), init_scale=1.0)
    out, variables = jax.device_get(jax.jit(block.init_with_output)(KEY, x))
    params = variables["params"]
    normed = jax.jit(layers.GroupNorm().apply)({"params": params["GroupNorm_0"]}, x)
    flat = np.asarray(normed, float).reshape(2, 12, 8)
    q, k, v = (flat @ params[f"NIN_{i}"]["W"] for i in range(3))
    logits = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(8))
    mixed = logits / logits.sum(-1, keepdims=True) @ v @ params["NIN_3"]["W"]
    expected = (x + mixed.reshape(x.shape)) / np.sqrt(2)
    np.testing.assert_allclose(out, expected, atol=2e-6)


def test_embeddings_equal_the_definition() -> None:
    label = np.float32([0.01, 3.0, 999.0])
    k = np.arange(4)
    angle = np.asarray(label, float)[:, None] * 10000 ** (-k / 3)
    expected = np.concatenate([np.sin(angle), np.cos(angle)], 1)
    found = jax.jit(layers.positional, static_argnums=1)(label, 8)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    w = normal(1, 4)
    project = layers.GaussianFourierProjection(4, 16.0)
    total = jax.jit(
        jax.value_and_grad(lambda p: project.apply({"params": p}, np.log(label))[1].sum())
    )
    out, gradient = total({"W": w})
    angle = 2 * np.pi * np.log(3) * np.asarray(w, float)
    np.testing.assert_allclose(out, np.sum(np.sin(angle) + np.cos(angle)), atol=1e-4)
    np.testing.assert_array_equal(gradient["W"], 0)
    init = jax.jit(layers.GaussianFourierProjection(20_000, 16.0).init)
    weights = np.asarray(init(KEY, label)["params"]["W"])
    assert abs(weights.std() / 16 - 1) < 5 / np.sqrt(2 * 20_000)


def test_initial_weights_have_variance_scale_over_average_fan() -> None:
    weights, zeros = jax.device_get(
        jax.jit(
            lambda key: (layers.fan_avg(0.1)(key, (3, 3, 40, 60)), layers.fan_avg(0.0)(key, (8, 8)))
        )(KEY)
    )
    limit = np.sqrt(3 * 0.1 / (9 * (40 + 60) / 2))
    assert 0.999 * limit < np.abs(weights).max() <= limit
    assert abs(weights.std() / (limit / np.sqrt(3)) - 1) < 0.02
    assert 0 < np.abs(zeros).max() < 1e-5


@pytest.mark.parametrize(("side", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1)])
def test_a_convolution_and_its_gradients_equal_those_of_flax(side: int, stride: int) -> None:
    x, shape = normal(1, 2, 6, 8, 8), (side, side, 8, 5)
    params = {"kernel": normal(2, *shape) / (8 * side), "bias": normal(3, 5)}
    dy = normal(4, 2, 6 // stride, 8 // stride, 5)

    @functools.partial(jax.jit, static_argnums=0)
    def found(layer: nn.Module, params: Any, x: jax.Array) -> Any:
        y, pullback = jax.vjp(lambda p, x: layer.apply({"params": p}, x), params, x)
        return y, pullback(dy)

    y, gradients = found(layers.Conv(5, side, stride), params, x)
    expected, expected_gradients = found(nn.Conv(5, (side, side), stride), params, x)
    same(y, expected)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4),
        gradients,
        expected_gradients,
    )


def with_zeros_between(x: np.ndarray) -> np.ndarray:
    """An image ``(h, w)`` with a zero after each entry in both directions, ``(2 h, 2 w)``."""
    out = np.zeros((x.shape[0] * 2, x.shape[1] * 2))
    out[::2, ::2] = x
    return out


KERNELS = [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1, 2, 5, 3, 1, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_fir_resampling_equals_a_convolution(kernel: tuple[float, ...]) -> None:
    x = normal(1, 1, 6, 8, 2)
    k, plane = np.outer(kernel, kernel) / np.sum(kernel) ** 2, np.asarray(x, float)[0, ..., 1]
    size = len(kernel)

    def padded(image: np.ndarray, excess: int, before: int) -> np.ndarray:
        return np.pad(image, (before, excess - before))

    wide = padded(with_zeros_between(plane), size - 1, (size - 1) // 2 + 1)
    up = scipy.signal.convolve2d(wide, 4 * k, "valid")
    np.testing.assert_allclose(layers.upsample(x, kernel)[0, ..., 1], up, atol=1e-6)
    smooth = scipy.signal.convolve2d(padded(plane, size - 2, (size - 1) // 2), k, "valid")
    down = smooth[::2, ::2]
    np.testing.assert_allclose(layers.downsample(x, kernel)[0, ..., 1], down, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS[:2])
@pytest.mark.parametrize("up", [True, False])
def test_fir_convolution_equals_scipy(up: bool, kernel: tuple[float, ...]) -> None:
    x = normal(1, 1, 6, 8, 2)
    layer = layers.Conv2d(3, kernel, up=up)
    w = np.asarray(normal(2, 3, 3, 2, 3), float)
    out = np.asarray(jax.jit(layer.apply)({"params": {"weight": w, "bias": np.ones(3)}}, x))
    k, size = np.outer(kernel, kernel) / np.sum(kernel) ** 2, len(kernel)
    expected = np.ones(out.shape[1:])
    for c in range(2):
        plane = np.asarray(x, float)[0, ..., c]
        for d in range(3):
            if up:  # transposed convolution, then the filter
                sparse = with_zeros_between(plane)[:-1, :-1]
                wide = scipy.signal.correlate2d(sparse, w[:, :, c, d], "full")
                pad = ((size - 3) // 2 + 1, (size - 4) // 2 + 1)
                expected[..., d] += scipy.signal.convolve2d(np.pad(wide, pad), 4 * k, "valid")
            else:  # the filter, then a strided convolution
                pad = ((size + 1) // 2, size // 2)
                smooth = scipy.signal.convolve2d(np.pad(plane, pad), k, "valid")
                full = scipy.signal.correlate2d(smooth, w[:, :, c, d], "valid")
                expected[..., d] += full[::2, ::2]
    np.testing.assert_allclose(out[0], expected, atol=1e-5)


def test_fir_resampling_keeps_a_constant_image_away_from_the_border() -> None:
    x, kernel = np.full((1, 8, 8, 1), 0.7, np.float32), (1, 3, 3, 1)
    up, down = jax.jit(lambda x: (layers.upsample(x, kernel), layers.downsample(x, kernel)))(x)
    same(np.asarray(up)[:, 2:-2, 2:-2], np.full((1, 12, 12, 1), 0.7))
    same(np.asarray(down)[:, 1:-1, 1:-1], np.full((1, 2, 2, 1), 0.7))
