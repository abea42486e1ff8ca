"""A residual multilayer perceptron for toy data of any shape.

    h ← h + W₂ dropout(swish(W₁ norm(h) + V temb)),   ``depth`` times, between two linear maps

``temb`` is an embedding of the noise label. The weights of the last map start at zero, so the
network before training predicts zero noise.
"""

from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import Count, Positive
from sbml.core.types import Array, Batch
from sbml.networks import _layers as layers


@typed
class Model(nn.Module):
    """Noise prediction of ``x (n, *s)`` at noise label ``label (n,)``; ``train`` turns dropout on.

    Attributes:
      width: number of hidden units.
      depth: number of residual blocks.
      dropout: the probability with which a hidden unit of a block is 0 in training.
      embedding_size: number of sinusoids of the label, even and at least 4.
      embedding_type: "positional" and "fourier_linear" embed the label, "fourier" its logarithm.
      fourier_scale: standard deviation of the random frequencies of the label's Fourier features.
      fourier: frequencies, in units of pi, of the input's features (``networks.frequencies``).
      classes: number of classes of a class-conditional network, whose embedding is added to that of
        the label; 0 means an unconditional network.
      outputs: how many numbers the network gives for every entry of x, along a new last axis; 0
        means one number, in the shape of x.
      dtype: "float32" or "bfloat16" arithmetic; parameters and output stay float32.
    """

    width: Count = 128
    depth: layers.Depth = 3
    dropout: layers.Rate = 0.0
    embedding_size: Annotated[
        int, condition("among 4, 6, 8 ...", lambda size: size >= 4 and size % 2 == 0)
    ] = 32
    embedding_type: layers.EmbeddingType = "positional"
    fourier_scale: Positive = 1.0
    fourier: layers.Frequencies = ()
    classes: layers.Classes = 0
    outputs: int = 0
    dtype: layers.Precision = "float32"

    @checked
    @nn.compact
    def __call__(
        self,
        x: Batch,
        label: layers.Labels,
        *,
        train: bool,
        condition: layers.Numbers | None = None,
    ) -> Array:
        dtype = jnp.dtype(self.dtype)
        temb = layers.embed(label, self.embedding_size, self.embedding_type, self.fourier_scale)
        temb = layers.dense(temb.astype(dtype), self.width)
        temb = nn.swish(layers.with_class(temb, self.classes, condition))
        flat = x.reshape(len(x), -1)
        h = layers.dense(layers.input_features(flat, self.fourier).astype(dtype), self.width)
        for _ in range(self.depth):
            inner = layers.dense(nn.LayerNorm(dtype=dtype)(h), self.width)
            hidden = nn.swish(inner + layers.dense(temb, self.width))
            hidden = nn.Dropout(self.dropout)(hidden, deterministic=not train)
            h = h + layers.dense(hidden, self.width)
        size = flat.shape[1] * max(1, self.outputs)
        # The means of a mixture over 256 levels need more digits than bfloat16 has.
        last = jnp.float32 if self.outputs else dtype
        out = nn.Dense(size, dtype=last, kernel_init=nn.initializers.zeros)(h)
        return layers.per_entry(out, x.shape, self.outputs).astype(jnp.float32)
