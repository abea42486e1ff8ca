"""The convolution and its derivatives against XLA's own, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from sbml import convolution

pytestmark = pytest.mark.usefixtures("x64", "small_images_too")


@pytest.fixture
def small_images_too(monkeypatch) -> None:
    monkeypatch.setattr(convolution, "LARGE", 1)


def xla(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(("side", "images"), [(1, 7), (3, 8), (3, 12), (5, 7)])
def test_gradients_equal_those_of_the_convolution(side: int, images: int) -> None:
    """Of batches that one, four and all eight parts divide."""
    x, dy = draw(1, images, 5, 6, 2), draw(3, images, 5, 6, 4)
    kernel = draw(2, side, side, 2, 4)
    y, pullback = jax.vjp(convolution.convolve, x, kernel)
    expected, expected_pullback = jax.vjp(xla, x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-12)
    for ours, theirs in zip(pullback(dy), expected_pullback(dy), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_stride_takes_every_other_pixel() -> None:
    x, kernel = draw(1, 2, 8, 8, 2), draw(2, 3, 3, 2, 4)
    every = convolution.convolve(x, kernel)  # Of an even side, "SAME" begins at the second one.
    np.testing.assert_allclose(convolution.convolve(x, kernel, 2), every[:, 1::2, 1::2], atol=1e-12)


def test_the_kernel_gradient_is_the_sum_of_products() -> None:
    x, dy = np.asarray(draw(1, 3, 4, 5, 2)), np.asarray(draw(3, 3, 4, 5, 6))
    (gradient,) = jax.vjp(lambda k: convolution.convolve(x, k), jnp.zeros((3, 3, 2, 6)))[1](dy)
    padded = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for a in range(3):
        for b in range(3):
            shifted = padded[:, a : a + 4, b : b + 5]
            expected = np.tensordot(shifted, dy, ((0, 1, 2), (0, 1, 2)))
            np.testing.assert_allclose(gradient[a, b], expected, atol=1e-12)


def test_other_modes_of_differentiation_equal_those_of_the_convolution() -> None:
    """Forward, forward then reverse (sliced score matching), under vmap, and twice in reverse."""
    x, v, kernel = draw(1, 3, 4, 5, 2), draw(2, 3, 4, 5, 2), draw(3, 3, 3, 2, 2)

    def forms(conv):
        def field(kernel, x):
            return jnp.tanh(conv(jnp.tanh(conv(x, kernel)), kernel))

        def form(kernel, x, v):
            return jnp.sum(v * jax.jvp(lambda x: field(kernel, x), (x,), (v,))[1])

        def one(kernel, x):
            return jnp.sum(field(kernel, x[None]) ** 3)

        def norm(kernel):
            return jnp.sum(jax.grad(lambda k: jnp.sum(field(k, x) ** 2))(kernel) ** 2)

        return [
            jax.jvp(field, (kernel, x), (jnp.ones_like(kernel), v))[1],
            jax.grad(form, argnums=(0, 1))(kernel, x, v),
            jax.vmap(jax.grad(one), (None, 0))(kernel, x),
            jax.grad(norm)(kernel),
        ]

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10),
        forms(convolution.convolve),
        forms(xla),
    )


def test_a_divergence_does_not_pay_for_the_kernel() -> None:
    x, kernel = draw(1, 3, 4, 5, 2), draw(3, 3, 3, 2, 2)
    forward = jax.make_jaxpr(
        lambda x: jax.jvp(lambda x: convolution.convolve(x, kernel), (x,), (x,))
    )
    assert "dot_general" not in str(forward(x))
    reverse = jax.make_jaxpr(jax.grad(lambda k: jnp.sum(convolution.convolve(x, k))))
    assert str(reverse(kernel)).count("dot_general") == 3


def test_add_bias_and_all_its_derivatives() -> None:
    x, v, bias = draw(1, 3, 4, 5, 2), draw(2, 3, 4, 5, 2), draw(3, 2)

    def forms(add):
        def field(bias, x):
            return jnp.square(add(jnp.tanh(add(x, bias)), bias))

        return [
            field(bias, x),
            jax.jvp(field, (bias, x), (jnp.ones_like(bias), v)),
            jax.vjp(field, bias, x)[1](v),
            jax.vmap(jax.grad(lambda b, x: field(b, x).sum()), (None, 0))(bias, x),
            jax.hessian(lambda b: field(b, x).sum())(bias),
        ]

    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12),
        forms(convolution.add_bias),
        forms(lambda x, bias: x + jnp.broadcast_to(bias, x.shape)),
    )
    only_x = jax.make_jaxpr(lambda x: jax.jvp(lambda x: convolution.add_bias(x, bias), (x,), (x,)))
    assert "dot_general" not in str(only_x(x))
