"""Networks of Flow++: gated convolutions and attention with data-dependent initialisation.

    y = x * kernel + bias,    initially with mean 0 and a chosen deviation over a batch

Images are ``(n, h, w, c)``. The initial outputs of every affine map, over the batch used for
initialisation, have mean 0 and a chosen standard deviation (Salimans & Kingma 2016): a layer draws
its kernel, divides it by the standard deviation of its outputs on that batch, and sets its bias so
that the mean is 0. The initialisers of Linen's ``Conv``, ``Dense`` and ``WeightNorm`` receive a
shape and no data, so the affine map is written here; normalisation, dropout, activations and
attention are flax's.

There are two published flows:

                        CIFAR-10                         ImageNet 32x32
    couplings           4                                8
    channels            mixed after each normalisation   not mixed
    convolutions        with a plain kernel              weight-normalised, g V / |V|
    end of a network    a convolution                    concat_elu and a convolution
    context network     3 gated convolutions             8, each with normalisation and attention
                                                         of 4 heads
    filters, blocks     96, 2                            128, 8
    parameters, 32x32   3,466,976                        35,482,720

The context network reads the image and passes its features to the couplings.

References: Ho et al. 2019 (Flow++), section 3.3; Song et al. 2021 use both flows.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sbml.core.types import Array, Key

VARIANCE_FLOOR = 1e-8
CONTEXT_FILTERS = 32
# Initial standard deviation of the inputs to gates and couplings, which then start near identity.
NARROW = 0.1


class Design(NamedTuple):
    """The layers of a flow, and how the networks in it are built; defaults are for CIFAR-10.

    ``context`` is the name of the context network in the parameters. It has ``context_blocks``
    gated convolutions, each followed by attention with ``context_heads`` heads, or by none if
    ``context_heads`` is 0.
    """

    couplings: int = 4
    mixes_channels: bool = True
    weight_norm: bool = False
    ends_in_elu: bool = False
    context: str = "ShallowProcessor_0"
    context_blocks: int = 3
    context_heads: int = 0


DESIGNS = {
    "cifar10": Design(),
    "imagenet32": Design(
        couplings=8,
        mixes_channels=False,
        weight_norm=True,
        ends_in_elu=True,
        context="DeepProcessor_0",
        context_blocks=8,
        context_heads=4,
    ),
}


def concat_elu(x: Array) -> Array:
    """[elu(x), elu(-x)] along the channels (Shang et al. 2016), which doubles their number."""
    return nn.elu(jnp.concatenate([x, -x], axis=-1))


class Affine(nn.Module):
    """y = x * kernel + bias: a convolution, or with ``kernel_size=()`` one map at every pixel.

    At initialisation each channel of y has mean 0 and standard deviation ``deviation``. With
    ``weight_norm`` the kernel of a convolution is scale * direction / |direction|, with one norm
    and one scale per output channel.
    """

    features: int
    kernel_size: tuple[int, ...] = ()
    deviation: float = 1.0
    weight_norm: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        draw = nn.initializers.normal(0.05)

        def fitted(key: Key) -> Array:
            kernel = draw(key, shape, x.dtype)
            return self._scaled(kernel, self._gain(x, kernel))

        if self.weight_norm and self.kernel_size:
            direction = self.param("direction", draw, shape, x.dtype)
            length = jnp.sqrt(jnp.square(direction).sum(range(len(shape) - 1)))
            unit = self._scaled(direction, 1 / length)
            kernel = self._scaled(unit, self.param("scale", lambda _: self._gain(x, unit)))
        else:
            kernel = self.param("kernel", fitted)
        y = self._linear(x, kernel)
        bias = self.param("bias", lambda _: -y.mean((0, 1, 2)))
        return y + jnp.broadcast_to(bias, y.shape)

    def _gain(self, x: Array, kernel: Array) -> Array:
        """Factors ``(features,)`` that give each channel of x * kernel the chosen ``deviation``."""
        variance = self._linear(x, kernel).var((0, 1, 2))
        return self.deviation * lax.rsqrt(variance + VARIANCE_FLOOR)

    @staticmethod
    def _scaled(kernel: Array, gain: Array) -> Array:
        return kernel * jnp.broadcast_to(gain, kernel.shape)

    def _linear(self, x: Array, kernel: Array) -> Array:
        if not self.kernel_size:
            return x @ kernel
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


class GatedConv(nn.Module):
    """x + GLU(second(concat_elu(first(concat_elu(x)) + a_proj(concat_elu(context)))))."""

    second_kernel: tuple[int, ...] = (3, 3)
    dropout: float = 0.0
    weight_norm: bool = False

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, *, train: bool = False) -> Array:
        channels, weight_norm = x.shape[-1], self.weight_norm
        h = Affine(channels, (3, 3), weight_norm=weight_norm, name="c1")(concat_elu(x))
        if context is not None:
            h = h + Affine(channels, name="a_proj")(concat_elu(context))
        h = nn.Dropout(self.dropout, deterministic=not train)(concat_elu(h))
        second = Affine(2 * channels, self.second_kernel, NARROW, weight_norm, name="c2")
        return x + nn.glu(second(h))


class GatedAttention(nn.Module):
    """x + GLU(proj2(attention(proj1(x + positions)))), attention over all pixels."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, positions: Array) -> Array:
        n, h, w, c = x.shape
        qkv = Affine(3 * c, name="proj1")(x + positions[None])
        q, k, v = jnp.moveaxis(qkv.reshape(n, h * w, 3, self.heads, c // self.heads), 2, 0)
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        return x + nn.glu(Affine(2 * c, deviation=NARROW, name="proj2")(attended))


def layer_norm(name: str) -> nn.LayerNorm:
    """Layer normalisation over the channels of each pixel."""
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)


def position_embedding(key: Key, x: Array, channels: int) -> Array:
    """Initial position embedding ``(h, w, channels)`` for the pixels of ``x (n, h, w, c)``."""
    return nn.initializers.normal(0.01)(key, (*x.shape[1:3], channels), x.dtype)


class CouplingNetwork(nn.Module):
    """Parameters of a coupling, ``features`` per pixel, from half of the image and the context."""

    model: Any  # a ``variational.Model``
    features: int

    @nn.compact
    def __call__(self, x: Array, context: Array, *, train: bool = False) -> Array:
        model, design = self.model, DESIGNS[self.model.design]
        weight_norm = design.weight_norm
        positions = self.param("pos_emb", position_embedding, x, model.filters)
        x = Affine(model.filters, (3, 3), weight_norm=weight_norm, name="proj_in")(x)
        for i in range(model.blocks):
            conv = GatedConv((), model.dropout, weight_norm, name=f"block{i}_conv")
            x = layer_norm(f"block{i}_ln1")(conv(x, context, train=train))
            attended = GatedAttention(model.heads, name=f"block{i}_attn")(x, positions)
            x = layer_norm(f"block{i}_ln2")(attended)
        if design.ends_in_elu:
            x = concat_elu(x)
        last = f"block{model.blocks - 1}_proj_out"
        return Affine(self.features, (3, 3), NARROW, weight_norm, name=last)(x)


class ContextProcessor(nn.Module):
    """Features of the image for the couplings: a convolution, then gated convolutions."""

    model: Any  # a ``variational.Model``

    @nn.compact
    def __call__(self, x: Array, *, train: bool = False) -> Array:
        design = DESIGNS[self.model.design]
        weight_norm, heads = design.weight_norm, design.context_heads
        x = Affine(CONTEXT_FILTERS, (3, 3), weight_norm=weight_norm, name="proj")(x)
        if heads:
            positions = self.param("pos_emb_dq", position_embedding, x, CONTEXT_FILTERS)
        for i in range(design.context_blocks):
            conv = GatedConv(dropout=self.model.dropout, weight_norm=weight_norm, name=f"c{i}")
            x = conv(x, train=train)
            if heads:
                x = layer_norm(f"dqln{i}")(x)
                x = GatedAttention(heads, name=f"dqattn{i}")(x, positions)
                x = layer_norm(f"ln{i}")(x)
        return x
