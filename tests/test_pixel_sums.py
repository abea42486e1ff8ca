"""Sums over pixels and their derivatives against the plain ones, in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linen import normal

from sbml.networks import _pixel_sums as sums

pytestmark = pytest.mark.usefixtures("x64")


def plain_moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x.mean((1, 2)), (x**2).mean((1, 2))


def plain_affine(x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return x * a[:, None, None] + b[:, None, None]


@pytest.mark.parametrize("height", [16, 11, 28])
def test_sums_and_all_their_derivatives(monkeypatch, height: int) -> None:
    """Eight parts of two rows, one of eleven, seven of four."""
    monkeypatch.setattr(sums, "LARGE", 1)
    x, v = normal(1, 2, height, 24, 3), normal(2, 2, height, 24, 3)
    a, b = normal(3, 2, 3), normal(4, 2, 3)

    def forms(moments: Any, affine: Any) -> list[Any]:
        def field(x, a, b):
            mean, square = moments(jnp.tanh(x))
            return jnp.tanh(affine(x, a * square, b - mean))

        def total(x, a, b):
            return jnp.sum(v * field(x, a, b) ** 2)

        def one(x, a, b):
            return jnp.sum(field(x[None], a[None], b[None]) ** 2)

        return [
            moments(x),
            affine(x, a, b),
            jax.jvp(field, (x, a, b), (v, b, a)),
            jax.grad(total, argnums=(0, 1, 2))(x, a, b),
            jax.vmap(jax.grad(one, argnums=(0, 1, 2)))(x, a, b),
            jax.grad(lambda x: jnp.sum(v * jax.jvp(lambda x: field(x, a, b), (x,), (v,))[1]))(x),
            jax.hessian(lambda b: total(x, a, b))(b),
        ]

    assert sums._pays(x)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10),
        forms(sums.moments, sums.affine),
        forms(plain_moments, plain_affine),
    )


def test_materialise_changes_no_value_and_no_derivative() -> None:
    x, v = normal(1, 2, 3, 4, 8), normal(2, 2, 3, 4, 8)
    y, dy = jax.jvp(lambda x: jnp.sin(sums.materialise(x)), (x,), (v,))
    np.testing.assert_array_equal(y, jnp.sin(x))
    np.testing.assert_array_equal(dy, v * jnp.cos(x))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(v * sums.materialise(x))))
    np.testing.assert_array_equal(gradient(x), v)
    assert np.isnan(gradient(x.at[0, 0, 0, 0].set(jnp.nan))).all()
    one_by_one = jax.vmap(jax.grad(lambda x, v: jnp.sum(v * sums.materialise(x))))
    np.testing.assert_array_equal(one_by_one(x, v), v)
