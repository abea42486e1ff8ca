"""Two dequantizers: one without and one with parameters that ``train_dequantizer`` trains."""

import dataclasses

import jax
import jax.numpy as jnp

from sbml.dequantizers import Dequantizer


@dataclasses.dataclass(frozen=True)
class Triangle(Dequantizer):
    """The mean of two uniform numbers, whose density is a triangle."""

    def sample(self, params, pixels, key):
        u = jax.random.uniform(key, (2, *pixels.shape)).mean(0)
        return u, jnp.sum(jnp.log(4 * jnp.minimum(u, 1 - u)))


@dataclasses.dataclass(frozen=True)
class Shrunk(Dequantizer):
    """Uniform around the middle of the bin, with a learned width."""

    dropout: float = 0.0
    first: float = 2.0

    def init(self, key, pixels):
        return {"logit": jnp.asarray(self.first)}

    def sample(self, params, pixels, key):
        width = jax.nn.sigmoid(params["logit"])
        u = 0.5 + width * (jax.random.uniform(key, pixels.shape) - 0.5)
        return u, -pixels.size * jnp.log(width)

    def sample_batch(self, params, pixels, keys, *, train):
        return jax.vmap(self.sample, (None, 0, 0))(params, pixels, keys)
