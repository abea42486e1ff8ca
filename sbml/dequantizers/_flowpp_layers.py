"""The networks of Flow++: convolutions with data-dependent initialisation, gated, with attention.

Images are ``(n, h, w, c)``. Every affine map starts such that its outputs on the batch that it is
initialised with have mean 0 and a chosen deviation (Salimans & Kingma 2016). A layer draws its
kernel, rescales it by what it does to that batch, and centres the result with its bias. Linen's own
``Conv`` and ``Dense`` show their initialisers a shape, not data, so the map itself is written here;
normalisation, dropout, activations and attention are flax's.

Reference: Ho et al. 2019 (Flow++), section 3.3.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sbml.types import Array, Key

VARIANCE_FLOOR = 1e-8
NARROW = 0.1  # deviation at initialisation of what enters a gate or the coupling: nearly identity


def concat_elu(x: Array) -> Array:
    """elu(x) beside elu(-x) (Shang et al. 2016): twice the channels."""
    return nn.elu(jnp.concatenate([x, -x], axis=-1))


class Affine(nn.Module):
    """y = x * kernel + bias: a convolution, or with ``kernel_size=()`` a linear map a pixel.

    At initialisation each channel of y has mean 0 and standard deviation ``deviation``.
    """

    features: int
    kernel_size: tuple[int, ...] = ()
    deviation: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)

        def fitted(key: Key) -> Array:
            kernel = nn.initializers.normal(0.05)(key, shape, x.dtype)
            variance = self._linear(x, kernel).var((0, 1, 2))
            gain = self.deviation * lax.rsqrt(variance + VARIANCE_FLOOR)
            return kernel * jnp.broadcast_to(gain, shape)

        y = self._linear(x, self.param("kernel", fitted))
        bias = self.param("bias", lambda _: -y.mean((0, 1, 2)))
        return y + jnp.broadcast_to(bias, y.shape)

    def _linear(self, x: Array, kernel: Array) -> Array:
        if not self.kernel_size:
            return x @ kernel
        return lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class GatedConv(nn.Module):
    """x + GLU(second(concat_elu(first(concat_elu(x)) + a_proj(concat_elu(context)))))."""

    second_kernel: tuple[int, ...] = (3, 3)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, *, train: bool = False) -> Array:
        channels = x.shape[-1]
        h = Affine(channels, (3, 3), name="c1")(concat_elu(x))
        if context is not None:
            h = h + Affine(channels, name="a_proj")(concat_elu(context))
        h = nn.Dropout(self.dropout, deterministic=not train)(concat_elu(h))
        return x + nn.glu(Affine(2 * channels, self.second_kernel, NARROW, name="c2")(h))


class GatedAttention(nn.Module):
    """x + GLU(proj2(attention(proj1(x + positions)))), over all pixels, ``heads`` at a time."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, positions: Array) -> Array:
        n, h, w, c = x.shape
        qkv = Affine(3 * c, name="proj1")(x + positions[None])
        q, k, v = jnp.moveaxis(qkv.reshape(n, h * w, 3, self.heads, c // self.heads), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.glu(Affine(2 * c, deviation=NARROW, name="proj2")(attended))


class CouplingNetwork(nn.Module):
    """What one half of the image and the context say about the other half, ``features`` a pixel."""

    features: int
    filters: int
    blocks: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, context: Array, *, train: bool = False) -> Array:
        positions = self.param(
            "pos_emb", nn.initializers.normal(0.01), (*x.shape[1:3], self.filters), x.dtype
        )
        x = Affine(self.filters, (3, 3), name="proj_in")(x)
        for i in range(self.blocks):
            conv = GatedConv((), self.dropout, name=f"block{i}_conv")
            x = conv(x, context, train=train)
            x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=f"block{i}_ln1")(x)
            x = GatedAttention(self.heads, name=f"block{i}_attn")(x, positions)
            x = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=f"block{i}_ln2")(x)
        last = f"block{self.blocks - 1}_proj_out"
        return Affine(self.features, (3, 3), NARROW, name=last)(x)


class ContextProcessor(nn.Module):
    """The image, as the couplings are shown it: a convolution and ``depth`` gated ones."""

    features: int
    depth: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        x = Affine(self.features, (3, 3), name="proj")(x)
        for i in range(self.depth):
            x = GatedConv(dropout=self.dropout, name=f"c{i}")(x, train=train)
        return x
