"""Uniform dequantization: u ~ U[0, 1)^d, log q(u | pixels) = 0.

For any density p of pixels + u, by Jensen's inequality (Theis et al. 2016),

    -log P(pixels) = -log E_u p(pixels + u) <= E_u [-log p(pixels + u)].
"""

import dataclasses

import jax
import jax.numpy as jnp

from sbml.core.door import checked
from sbml.core.types import Example, Key, Pixels, PyTree, Scalar
from sbml.dequantizers.base import Dequantizer


@dataclasses.dataclass(frozen=True)
class Model(Dequantizer):
    """The uniform dequantizer, which has no parameters."""

    @checked
    def sample(self, params: PyTree, pixels: Pixels, key: Key) -> tuple[Example, Scalar]:
        """u of the shape of one example ``pixels (*s)``, and log q(u | pixels) = 0 in nats."""
        return jax.random.uniform(key, pixels.shape), jnp.zeros(())
