"""Uniform dequantization: u ~ U[0, 1)^d, log q(u | pixels) = 0.

Jensen's inequality makes any density estimate of pixels + u a bound on the integers' likelihood
(Theis et al. 2016).
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sbml.types import Example, Key, PixelBatch, Pixels, Scalar


@dataclasses.dataclass(frozen=True)
class Model:
    """A dequantizer with nothing to learn."""

    at_noise: ClassVar[bool] = False

    def init(self, key: Key, pixels: PixelBatch) -> Any:
        """No parameters."""
        return {}

    def sample(self, params: Any, pixels: Pixels, key: Key) -> tuple[Example, Scalar]:
        """u of the shape of one example ``pixels (*s)``, and log q(u | pixels) = 0 in nats."""
        u = jax.random.uniform(key, pixels.shape)
        return u, jnp.zeros(())
