"""Changes of variables in float32, for data whose digits float32 does not have."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sbml
from sbml import samplers
from sbml.core import pytrees
from sbml.core.types import Anything, Array, Key

DDIM = samplers.DDIM(4)
MEAN, SCALE = 1e9, 2.0  # of data 1e9 + 2 x, in which float32 has one value in 64 units


@pytrees.register
@dataclass(frozen=True)
class Shift:
    """y = mean + 2 x."""

    mean: float | Array

    def forward(self, x: Array) -> Array:
        return self.mean + SCALE * x

    def inverse_and_log_det(self, y: Array) -> tuple[Array, Array]:
        return (y - self.mean) / SCALE, -y.shape[-1] * jnp.log(SCALE)


def density(mean: float) -> sbml.Density:
    """The density of mean + 2 x with x from N(0, I), for which the score -x is exact."""
    return sbml.Density(lambda x, t, key: -x, sbml.VP(), (2,), transform=Shift(mean))


def of_normal(y: np.ndarray) -> np.ndarray:
    """log p of ``y (n, 2)``."""
    z = (y - MEAN) / SCALE
    return -0.5 * (z**2).sum(axis=1) - np.log(2 * np.pi * SCALE**2)


def test_digits_that_float32_does_not_have_are_kept() -> None:
    d, key = density(MEAN), jax.random.key(0)
    y = MEAN + SCALE * np.random.default_rng(0).normal(size=(6, 2))
    np.testing.assert_allclose(d.log_prob(y), of_normal(y), atol=2e-3)
    drawn, logp = d.sample_and_log_prob(key, 6, sampler=DDIM)
    centred = density(0.0).sample_and_log_prob(key, 6, sampler=DDIM)
    np.testing.assert_allclose(drawn - MEAN, centred[0], atol=1e-6)
    np.testing.assert_allclose(logp, centred[1], atol=1e-6)


def test_traced_transforms_that_float32_is_too_coarse_for_are_refused() -> None:
    y, key = jnp.ones((1, 2), jnp.float32), jax.random.key(0)
    needs = "neighbours are 32 apart in x, too coarse for log p: call this outside"

    def drawn(mean: float) -> Callable[[Key], tuple[Anything, Anything]]:
        return lambda key: density(mean).sample_and_log_prob(key, 2, sampler=DDIM)

    for call in (
        lambda: jax.jit(drawn(MEAN))(key),
        lambda: jax.grad(lambda y: density(MEAN).log_prob(y).sum())(y),
        lambda: density(MEAN).importance(key, 2, lambda y: y.sum()),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=needs):
            jax.block_until_ready(call())
    for traced, expected in zip(jax.jit(drawn(1e3))(key), drawn(1e3)(key), strict=True):
        np.testing.assert_allclose(traced, expected, atol=1e-3)
