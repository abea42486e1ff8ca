"""Uniform dequantization: u ~ U[0, 1)^d, log q(u | pixels) = 0.

For any density p of pixels + u, by Jensen's inequality (Theis et al. 2016),

    -log P(pixels) = -log E_u p(pixels + u) <= E_u [-log p(pixels + u)].
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from sbml.door import checked
from sbml.types import Example, Key, PixelBatch, Pixels, Scalar


@dataclasses.dataclass(frozen=True)
class Model:
    """The uniform dequantizer, which has no parameters."""

    at_noise: ClassVar[bool] = False

    def init(self, key: Key, pixels: PixelBatch) -> Any:
        """No parameters."""
        return {}

    @checked
    def sample(self, params: Any, pixels: Pixels, key: Key) -> tuple[Example, Scalar]:
        """u of the shape of one example ``pixels (*s)``, and log q(u | pixels) = 0 in nats."""
        return jax.random.uniform(key, pixels.shape), jnp.zeros(())
