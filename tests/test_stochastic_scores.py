"""A score may draw from its key: dropout in plain JAX, Flax Linen, Flax NNX and Equinox."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sbml.core.types import Array, Key, Score, batch_score

pytestmark = pytest.mark.usefixtures("x64")


def dropout_plain(x: Array, t: Array, key: Key | None) -> Array:
    return x if key is None else jnp.where(jax.random.bernoulli(key, shape=x.shape), 2 * x, 0)


def dropout_linen(x: Array, t: Array, key: Key | None) -> Array:
    rngs = None if key is None else {"dropout": key}
    return nn.Dropout(0.5).apply({}, x, deterministic=key is None, rngs=rngs)


def dropout_nnx(x: Array, t: Array, key: Key | None) -> Array:
    return nnx.Dropout(0.5)(x, deterministic=key is None, rngs=key)


def dropout_equinox(x: Array, t: Array, key: Key | None) -> Array:
    return eqx.nn.Dropout(0.5)(x, key=key, inference=key is None)


@pytest.mark.parametrize("score", [dropout_plain, dropout_linen, dropout_nnx, dropout_equinox])
def test_stochastic_layers_draw_from_the_key(score: Score) -> None:
    """Each example has its own mask; the same key gives the same masks, and no key gives none."""
    x, t = jnp.ones((3, 64)), jnp.ones(3)
    f = jax.jit(batch_score(score))
    with_key = f(x, t, jax.random.key(0))
    assert set(np.unique(with_key)) == {0.0, 2.0}
    assert len(np.unique(with_key, axis=0)) == 3
    np.testing.assert_array_equal(with_key, f(x, t, jax.random.key(0)))
    np.testing.assert_array_equal(f(x, t, None), x)
