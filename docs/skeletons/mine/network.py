"""A network: replace the body of ``__call__``. Its output has the shape of ``x``."""

import jax.numpy as jnp
from flax import linen as nn


class Small(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, label, *, train):
        h = jnp.concatenate([x.reshape(len(x), -1), label[:, None]], axis=-1)
        h = nn.tanh(nn.Dense(self.width)(h))
        return nn.Dense(x[0].size, kernel_init=nn.initializers.zeros)(h).reshape(x.shape)
