"""NCSN++ and DDPM++: a U-Net of residual blocks conditioned on the noise level (Song et al. 2021).

    x ─ conv ─▶ blocks ─▶ ½ ─▶ blocks ─▶ ½ ─▶ blocks ─▶ block
                  │ skips        │              │     attention
    y ◀─ conv ◀─ blocks ◀─ 2 ◀─ blocks ◀─ 2 ◀─ blocks ◀─ block

A block is a ``ResidualBlock`` of ``_layers``, which also reads the noise level. A block of the
decoder also reads features of the encoder (the skips), the last ones first. With optional pyramids,
every level of the encoder also reads the input at its own size, and the output is a sum over the
levels of the decoder.

The defaults are the CIFAR-10 DDPM++ of "Maximum Likelihood Training of Score-Based Diffusion
Models" (Song et al. 2021). Parameters are named as in the JAX checkpoints of Song et al., so these
load unchanged.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import Positive, at_least, one_of
from sbml.core.types import Array
from sbml.networks import _layers as layers
from sbml.networks._layers import Images, Labels, Map

ACTIVATIONS: dict[str, Map] = {
    "swish": nn.swish,
    "elu": nn.elu,
    "relu": nn.relu,
    "lrelu": partial(nn.leaky_relu, negative_slope=0.2),
}

Block = Callable[..., Array]


class ResnetBlockBigGANpp(layers.ResidualBlock):
    """The block that can resample inside."""


class ResnetBlockDDPMpp(layers.ResidualBlock):
    """The block that never resamples."""

    names = (*layers.ResidualBlock.names[:-1], "NIN_0")

    @nn.nowrap
    def shortcut(self, x: Array, features: int, name: str) -> Array:
        return layers.NIN(features, name=name)(x)


class AttnBlockpp(layers.Attention):
    """Attention with one head, whose last map has the variance scale ``init_scale``."""

    init_scale: float = 0.0

    names = ("GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3")

    @nn.nowrap
    def affine(self, x: Array, name: str, last: bool) -> Array:
        return layers.NIN(x.shape[-1], self.init_scale if last else 0.1, name=name)(x)


class Combine(nn.Module):
    """The input pyramid ``x`` is mapped to the channels of ``y`` and then added to ``y`` ("sum") or
    concatenated with it ("cat")."""

    method: str

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        x = layers.Conv(y.shape[-1], 1)(x)
        return x + y if self.method == "sum" else jnp.concatenate([x, y], axis=-1)


@typed
class Model(nn.Module):
    """Noise prediction of ``x (n, h, w, c)`` in [-1, 1] at noise label ``label (n,)``.

    Attributes:
      nf, ch_mult: level i has ``nf * ch_mult[i]`` channels; the image is halved between levels.
      num_res_blocks: number of residual blocks per level of the encoder; the decoder has one more.
      attn_resolutions: image heights at which attention follows the blocks.
      dropout: rate of dropout inside every residual block.
      conditional: whether the blocks read the label.
      embedding_type: "positional" and "fourier_linear" embed the label itself (in Song et al.'s
        models 999 t), "fourier" its logarithm (in their VE models the label is sigma).
      fourier_scale: standard deviation of the random frequencies of the label's Fourier features.
      resblock_type: "ddpm" resamples between blocks, "biggan" inside blocks.
      resamp_with_conv: whether resampling between "ddpm" blocks includes a convolution.
      fir, fir_kernel: if ``fir``, resample with this filter instead of nearest neighbours (up) and
        means of 2x2 pixels (down).
      progressive: the output pyramid: "none"; "output_skip", a sum of images, one per level; or
        "residual", features that each level adds to and the last level maps to an image.
      progressive_input: the input pyramid: "none"; "input_skip", the halved image joins each
        level's features; or "residual", features that each level adds to and passes on.
      progressive_combine: how "input_skip" joins the image to the features: "sum" or "cat".
      skip_rescale: divide each residual sum by √2.
      nonlinearity: "swish", "elu", "relu" or "lrelu" (slope 0.2).
      init_scale: variance scale of the last layer of each branch; with 0 every branch starts at
        (nearly) zero.
      fourier: frequencies, in units of pi, of the input's features (``networks.frequencies``).
      classes: number of classes of a class-conditional network, whose embedding is added to that of
        the label; 0 means an unconditional network.
      outputs: how many numbers the network gives for every entry of x, along a new last axis; 0
        means one number, in the shape of x.
      dtype: "float32" or "bfloat16" arithmetic; parameters, statistics and output stay float32.
      remat: compute each residual block again for its gradient instead of storing its intermediate
        results: less memory, up to a third more arithmetic.

    Raises:
      ValueError: the images cannot be halved as often as ``ch_mult`` says, no level has a height
        in ``attn_resolutions``, or the parameters are for another number of channels.
    """

    nf: Annotated[int, at_least(4)] = 128
    ch_mult: Annotated[
        tuple[int, ...],
        condition("of one positive integer per level", lambda mults: mults and min(mults) > 0),
    ] = (1, 2, 2, 2)
    num_res_blocks: layers.PerLevel = 4
    attn_resolutions: Annotated[
        tuple[int, ...], condition("of positive integers", lambda value: all(r > 0 for r in value))
    ] = (16,)
    dropout: layers.Rate = 0.1
    conditional: bool = True
    embedding_type: layers.EmbeddingType = "positional"
    fourier_scale: Positive = 16.0
    resblock_type: Annotated[str, one_of("ddpm", "biggan")] = "biggan"
    resamp_with_conv: bool = True
    fir: bool = False
    fir_kernel: Annotated[
        tuple[float, ...], condition("whose sum is above 0", lambda taps: sum(taps) > 0)
    ] = (1, 3, 3, 1)
    progressive: Annotated[str, one_of("none", "output_skip", "residual")] = "none"
    progressive_input: Annotated[str, one_of("none", "input_skip", "residual")] = "none"
    progressive_combine: Annotated[str, one_of("sum", "cat")] = "sum"
    skip_rescale: bool = True
    nonlinearity: Annotated[str, one_of(*ACTIVATIONS)] = "swish"
    init_scale: Annotated[float, at_least(0)] = 0.0
    fourier: layers.Frequencies = ()
    classes: layers.Classes = 0
    outputs: int = 0
    dtype: layers.Precision = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.classes and not self.conditional:
            raise ValueError(
                f"classes={self.classes} with conditional=False: the class is read with the label; "
                "set conditional=True"
            )
        super().__post_init__()

    @checked
    @nn.compact
    def __call__(
        self, x: Images, label: Labels, *, train: bool, condition: layers.Numbers | None = None
    ) -> Array:
        self._check_input(x)
        dtype = jnp.dtype(self.dtype)
        temb = layers.embed(label, self.nf, self.embedding_type, self.fourier_scale).astype(dtype)
        if self.conditional:
            temb = layers.dense(self._act(layers.dense(temb, 4 * self.nf)), 4 * self.nf)
            temb = layers.with_class(temb, self.classes, condition)
        ddpm = self.resblock_type == "ddpm"
        kind = partial(
            layers.recomputed(ResnetBlockDDPMpp if ddpm else ResnetBlockBigGANpp, self.remat),
            act=self._act,
            dropout=self.dropout,
            scale=self._scale,
            init_scale=self.init_scale,
        )
        head = partial(
            layers.head,
            features=x.shape[-1] * max(1, self.outputs),
            act=self._act,
            outputs=self.outputs,
            init_scale=self.init_scale,
        )

        def block(h: Array, features: int = 0, resample: Map | None = None) -> Array:
            layer = kind(features=features, resample=resample, mapped=resample is not None)
            return layer(h, temb if self.conditional else None, train)

        skips = self._encode(x, block)
        h = block(self._attend(block(skips[-1]), always=True))
        out = self._decode(h, skips, block, head)
        return layers.per_entry(out, x.shape, self.outputs).astype(jnp.float32)

    @nn.nowrap
    def _encode(self, x: Array, block: Block) -> list[Array]:
        """The features after the first convolution, every block and every halving, in order."""
        dtype = jnp.dtype(self.dtype)
        features, pyramid = layers.input_features(x, self.fourier).astype(dtype), x.astype(dtype)
        skips = [layers.Conv(self.nf)(features)]
        for level, mult in enumerate(self.ch_mult):
            for _ in range(self.num_res_blocks):
                skips.append(self._attend(block(skips[-1], self.nf * mult)))
            if level < len(self.ch_mult) - 1:
                pyramid, h = self._join_input(pyramid, self._resize(skips[-1], block, up=False))
                skips.append(h)
        return skips

    @nn.nowrap
    def _decode(self, h: Array, skips: list[Array], block: Block, head: Map) -> Array:
        """The output image, from the features ``h`` and ``skips``; this empties ``skips``."""
        pyramid = None
        for level in reversed(range(len(self.ch_mult))):
            for _ in range(self.num_res_blocks + 1):
                joined = jnp.concatenate([h, skips.pop()], axis=-1)
                h = block(joined, self.nf * self.ch_mult[level])
            pyramid, h = self._join_output(pyramid, self._attend(h), head)
            if level > 0:
                h = self._resize(h, block, up=True)
        assert not skips
        if self.progressive == "output_skip":
            assert pyramid is not None
            return pyramid
        return head(h)

    @nn.nowrap
    def _join_input(self, pyramid: Array, h: Array) -> tuple[Array, Array]:
        """The input pyramid at the next smaller size, and ``h`` with the pyramid joined to it."""
        if self.progressive_input == "none":
            return pyramid, h
        if self.progressive_input == "input_skip":
            pyramid = layers.Downsample(False, self._fir)(pyramid)
            return pyramid, Combine(self.progressive_combine)(pyramid, h)
        pyramid = layers.Downsample(True, self._fir, h.shape[-1])(pyramid)
        joined = layers.residual(pyramid, h, self._scale)
        return joined, joined

    @nn.nowrap
    def _join_output(
        self, pyramid: Array | None, h: Array, head: Map
    ) -> tuple[Array | None, Array]:
        """The output pyramid at the size of ``h``, from that of half this size (``None`` if there
        is none), and the features of the next level."""
        if self.progressive == "none":
            return None, h
        if self.progressive == "output_skip":
            if pyramid is not None:
                pyramid = layers.Upsample(False, self._fir)(pyramid)
            image = head(h)
            return (image if pyramid is None else pyramid + image), h
        if pyramid is None:
            return layers.head(h, h.shape[-1], self._act, init_scale=1.0), h
        pyramid = layers.Upsample(True, self._fir, h.shape[-1])(pyramid)
        joined = layers.residual(pyramid, h, self._scale)
        return joined, joined

    @nn.nowrap
    def _resize(self, h: Array, block: Block, *, up: bool) -> Array:
        """``h`` at twice or half its size, between blocks (ddpm) or inside one (biggan)."""
        if self.resblock_type == "biggan":
            resample = layers.upsample if up else layers.downsample
            return block(h, resample=lambda x: resample(x, self._fir))
        layer = layers.Upsample if up else layers.Downsample
        return layer(self.resamp_with_conv, self._fir)(h)

    @nn.nowrap
    def _attend(self, h: Array, always: bool = False) -> Array:
        if not always and h.shape[1] not in self.attn_resolutions:
            return h
        return AttnBlockpp(self._scale, init_scale=self.init_scale)(h)

    @property
    def _act(self) -> Map:
        return ACTIVATIONS[self.nonlinearity]

    @property
    def _scale(self) -> float:
        return math.sqrt(2) if self.skip_rescale else 1.0

    @property
    def _fir(self) -> tuple[float, ...] | None:
        return self.fir_kernel if self.fir else None

    @nn.nowrap
    def _check_input(self, x: Array) -> None:
        levels = len(self.ch_mult)
        layers.check_halvings(x, levels, f"ch_mult={self.ch_mult}")
        heights = [x.shape[1] // 2**level for level in range(levels)]
        if not set(self.attn_resolutions) <= set(heights):
            raise ValueError(
                f"attn_resolutions={self.attn_resolutions}: with these images and this ch_mult the "
                f"levels have the heights {heights}; choose among them."
            )
        if self.has_variable("params", "Conv_0"):
            inputs = self.variables["params"]["Conv_0"]["kernel"].shape[2]
            expected = inputs // (1 + 2 * len(self.fourier))
            if x.shape[3] != expected:
                raise ValueError(
                    f"Images of {x.shape[3]} channels: these parameters were made for {expected}; "
                    "give images with that many channels or other parameters."
                )
