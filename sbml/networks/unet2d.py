"""The network of unconditional diffusion models in diffusers, ``UNet2DModel``, and its weights.

    x ─ conv ─▶ blocks ─▶ ½ ─▶ blocks ─▶ ½ ─▶ blocks ─▶ block
                  │ skips        │              │     attention
    y ◀─ conv ◀─ blocks ◀─ 2 ◀─ blocks ◀─ 2 ◀─ blocks ◀─ block

Every block reads the noise level through one vector,

    cond = dense(silu(dense(features of the label)))

A level of the encoder is a "down block", a level of the decoder an "up block". Those with "Skip" in
their names are NCSN++'s: they resample with a FIR filter, divide sums by √2, and join the pyramids
of the input's and the output's images. The fields and the parameters are named as in diffusers:

    model = unet2d.Model(**unet2d.fields(config))  # config.json
    params = unet2d.params(state)                  # diffusion_pytorch_model.safetensors

The label is diffusers' ``timestep``. With ``time_embedding_type="positional"`` it is the number of
the step, 0 ... 999 in published models, and the network usually predicts the noise. With "fourier"
it is sigma, the standard deviation of the noise, and the output is divided by it: a network that
predicts minus the noise thus gives the score.

References: Ho et al. 2020 (DDPM), Song et al. 2021 (NCSN++), Dhariwal and Nichol 2021 (heads,
"scale_shift", resampling inside blocks); diffusers 0.42.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from sbml.core.door import brief, checked, condition, typed
from sbml.core.scalars import Positive, at_least, between, one_of
from sbml.core.types import Array
from sbml.networks import _layers as layers
from sbml.networks._layers import Images, Labels, Map

ACTIVATIONS: dict[str, Map] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": partial(nn.gelu, approximate=False),
    "relu": nn.relu,
}
DOWN = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
DOWN_SKIP = ("SkipDownBlock2D", "AttnSkipDownBlock2D")
UP = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
UP_SKIP = ("SkipUpBlock2D", "AttnSkipUpBlock2D")
FIR = (1, 3, 3, 1)


def _among(names: tuple[str, ...]) -> Any:
    words = f"of names among {', '.join(map(repr, names))}"
    return condition(words, lambda value: value and all(name in names for name in value))


class TimeEmbedding(nn.Module):
    """dense(silu(dense(x))), from the features of the label to the vector that blocks read."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.silu(layers.dense(x, self.features, "linear_1"))
        return layers.dense(h, self.features, "linear_2")


class Resnet(layers.ResidualBlock):
    """The residual block of diffusers."""

    names = ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")


class Attention(layers.Attention):
    """The attention of diffusers."""

    names = ("group_norm", "to_q", "to_k", "to_v", "to_out.0")


class _Level(nn.Module):
    """What down and up blocks share.

    Attributes:
      block, attention: the modules with their options; without attention None.
      depth: number of residual blocks.
      how: how the size of the image changes after them: "conv", by a convolution; "resnet", inside
        one more residual block; or "none", at the last down block and the last up block.
      pyramid: whether this is one of the "Skip" blocks.
      padding: of the convolution that halves the image.
    """

    block: Callable[..., Resnet]
    attention: Callable[..., Attention] | None
    depth: int
    how: str
    pyramid: bool
    padding: int

    up: ClassVar[bool]

    @nn.nowrap
    def attend(self, h: Array, i: int) -> Array:
        return self.attention(name=f"attentions.{i}")(h) if self.attention else h

    @nn.nowrap
    def resize(self, h: Array, cond: Array, train: bool) -> Array:
        """``h`` at twice or half its height and width."""
        side = "up" if self.up else "down"
        if self.how == "conv":
            layer, zeros = layers.Upsample if self.up else layers.Downsample, (self.padding, 1)
            padding = "SAME" if self.up else (zeros, zeros)
            return layer(True, None, padding=padding, conv="conv", name=f"{side}samplers.0")(h)
        name, fir = (f"resnet_{side}", FIR) if self.pyramid else (f"{side}samplers.0", None)
        resample = partial(layers.upsample if self.up else layers.downsample, fir_kernel=fir)
        return self.block(resample=resample, mapped=self.pyramid, name=name)(h, cond, train)


class Down(_Level):
    """A level of the encoder. It reads features, the image at their size, and the condition, and
    returns the features after every residual block and after the halving, and the image at their
    size."""

    up = False

    @nn.compact
    def __call__(
        self, h: Array, image: Array, cond: Array, train: bool
    ) -> tuple[list[Array], Array]:
        found = []
        for i in range(self.depth):
            h = self.attend(self.block(name=f"resnets.{i}")(h, cond, train), i)
            found.append(h)
        if self.how == "none":
            return found, image
        h = self.resize(h, cond, train)
        if self.pyramid:
            image = layers.downsample(image, FIR)
            h = layers.Conv(h.shape[-1], 1, name="skip_conv")(image) + h
        return [*found, h], image


class Middle(nn.Module):
    """block(attention(block(h))); the attention is optional."""

    block: Callable[..., Resnet]
    attention: Callable[..., Attention] | None

    @nn.compact
    def __call__(self, h: Array, cond: Array, train: bool) -> Array:
        h = self.block(name="resnets.0")(h, cond, train)
        h = self.attention(name="attentions.0")(h) if self.attention else h
        return self.block(name="resnets.1")(h, cond, train)


class Up(_Level):
    """A level of the decoder. It reads features, the encoder's ``skips``, the last first, the
    output's image at half its size (None before the first), and the condition; it returns features
    and the image."""

    up = True

    @nn.compact
    def __call__(
        self,
        h: Array,
        skips: list[Array],
        image: Array | None,
        cond: Array,
        train: bool,
        head: Callable[..., Array],
    ) -> tuple[Array, Array | None]:
        for i, skip in enumerate(skips):
            block = partial(self.block, name=f"resnets.{i}")
            if self.pyramid and self.attention:
                # As diffusers has it: only the second number is divided.
                block = partial(block, groups=(min(h.shape[-1] + skip.shape[-1] // 4, 32), 0))
            h = block()(jnp.concatenate([h, skip], axis=-1), cond, train)
            h = h if self.pyramid else self.attend(h, i)
        if self.pyramid:
            h = self.attend(h, 0)
            image = None if image is None else layers.upsample(image, FIR)
        if self.how == "none":
            return h, image
        if self.pyramid:
            part = head(h, names=("skip_norm", "skip_conv"))
            image = part if image is None else image + part
        return self.resize(h, cond, train), image


Level = TypeVar("Level", bound=_Level)


@typed
class Model(nn.Module):
    """``UNet2DModel`` of ``x (n, h, w, c)`` at diffusers' timesteps ``label (n,)``.

    Defaults are diffusers'. Where diffusers has None, a number is 0 here, and a text "none".

    Attributes:
      block_out_channels: number of channels of every level; the image is halved between levels.
      layers_per_block: number of residual blocks per down block; an up block has one more.
      down_block_types, up_block_types: the kind of every level, the decoder's from small to large.
        "Attn" blocks have attention; "Skip" blocks, NCSN++'s, must come before the other down
        blocks and after the other up blocks; "Resnet" blocks resample inside residual blocks.
      mid_block_type: "UNetMidBlock2D", two residual blocks; or "none".
      add_attention: whether the middle has attention.
      center_input_sample: whether the network reads 2x - 1 in place of x.
      time_embedding_type: "positional" for a label that counts steps; or "fourier" for sigma, whose
        logarithm is read, and by which the output is divided.
      time_embedding_dim: size of the vector that blocks read; 0 means 4 block_out_channels[0].
      flip_sin_to_cos: whether the positional features have the cosines first.
      freq_shift: the i-th of m positional frequencies is 10000^(-i / (m - freq_shift)). If
        block_out_channels[0] is odd, the last feature is 0.
      downsample_type, upsample_type: "conv", or "resnet" inside residual blocks; of "Attn" blocks
        without "Skip".
      downsample_padding: 1 halves by a convolution with zeros on all sides, 0 with zeros on the
        right and at the bottom only.
      mid_block_scale_factor: what the sums in the middle are divided by.
      dropout: rate of dropout inside every residual block.
      act_fn: "silu" or "swish", which are the same, "mish", "gelu" or "relu".
      attention_head_dim: number of channels of every head of attention; 0 means one head.
      norm_num_groups: number of groups of the norms; 0 means min(c // 4, 32) of c channels, and
        needs "Skip" blocks, whose norms have these groups in any case.
      attn_norm_num_groups: number of groups of the norm before the middle's attention; 0 means as
        many as in the middle's blocks, but no norm with "scale_shift".
      norm_eps: what every norm adds to the variance.
      resnet_time_scale_shift: "default" adds the noise level's vector to the features of a block,
        "scale_shift" also multiplies by it, after the second norm.
      classes: number of classes of a class-conditional network, whose embedding is added to the
        vector that blocks read; 0 means an unconditional network.
      outputs: how many numbers the network gives for every entry of x, along a new last axis; 0
        means one number, in the shape of x.
      dtype: "float32", "bfloat16" or "float64" arithmetic; the output is float32 or float64.
      remat: compute each residual block again for its gradient instead of storing its intermediate
        results.

    Raises:
      ValueError: the levels do not fit each other, or the images cannot be halved between them.
    """

    block_out_channels: Annotated[
        tuple[int, ...],
        condition(
            "of positive integers, the first at least 4",
            lambda widths: widths and min(widths) > 0 and widths[0] >= 4,
        ),
    ] = (224, 448, 672, 896)
    layers_per_block: layers.PerLevel = 2
    down_block_types: Annotated[tuple[str, ...], _among(DOWN_SKIP + DOWN)] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
        "AttnDownBlock2D",
    )
    mid_block_type: Annotated[str, one_of("UNetMidBlock2D", "none")] = "UNetMidBlock2D"
    up_block_types: Annotated[tuple[str, ...], _among(UP + UP_SKIP)] = (
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "AttnUpBlock2D",
        "UpBlock2D",
    )
    add_attention: bool = True
    center_input_sample: bool = False
    time_embedding_type: Annotated[str, one_of("positional", "fourier")] = "positional"
    time_embedding_dim: Annotated[int, at_least(0)] = 0
    flip_sin_to_cos: bool = True
    freq_shift: Annotated[int, between(0, 1)] = 0
    downsample_type: Annotated[str, one_of("conv", "resnet")] = "conv"
    upsample_type: Annotated[str, one_of("conv", "resnet")] = "conv"
    downsample_padding: Annotated[int, between(0, 1)] = 1
    mid_block_scale_factor: Positive = 1.0
    dropout: layers.Rate = 0.0
    act_fn: Annotated[str, one_of(*ACTIVATIONS)] = "silu"
    attention_head_dim: Annotated[int, at_least(0)] = 8
    norm_num_groups: Annotated[int, at_least(0)] = 32
    attn_norm_num_groups: Annotated[int, at_least(0)] = 0
    norm_eps: Positive = 1e-5
    resnet_time_scale_shift: Annotated[str, one_of("default", "scale_shift")] = "default"
    classes: layers.Classes = 0
    outputs: int = 0
    dtype: Annotated[str, one_of("float32", "bfloat16", "float64")] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        widths, down, up = self.block_out_channels, self.down_block_types, self.up_block_types
        if not len(widths) == len(down) == len(up):
            raise ValueError(
                f"block_out_channels={brief(widths)} ({len(widths)}), down_block_types="
                f"{brief(down)} ({len(down)}) and up_block_types={brief(up)} ({len(up)}): "
                "give one of each per level"
            )
        down_skip, up_skip = [k in DOWN_SKIP for k in down], [k in UP_SKIP for k in up]
        if down_skip != sorted(down_skip, reverse=True) or up_skip != sorted(up_skip):
            raise ValueError(
                f"down_block_types={brief(down)} and up_block_types={brief(up)}: give the down "
                "blocks with Skip before those without, and the up blocks with Skip after those "
                "without"
            )
        if self.norm_num_groups == 0 and not all(down_skip + up_skip):
            raise ValueError(
                f"norm_num_groups=0 with down_block_types={brief(down)} and up_block_types="
                f"{brief(up)}: give the number of groups, which only blocks with Skip do without"
            )
        super().__post_init__()

    @checked
    @nn.compact
    def __call__(
        self, x: Images, label: Labels, *, train: bool, condition: layers.Numbers | None = None
    ) -> Array:
        widths = self.block_out_channels
        layers.check_halvings(x, len(widths), f"block_out_channels={brief(widths)}")
        dtype = jnp.dtype(self.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        label = label.astype(wide)
        image = (2 * x - 1 if self.center_input_sample else x).astype(dtype)
        head = partial(
            layers.head,
            features=x.shape[-1] * max(1, self.outputs),
            act=nn.silu,
            outputs=self.outputs,
            epsilon=self.norm_eps,
        )
        time = TimeEmbedding(self.time_embedding_dim or 4 * widths[0], name="time_embedding")
        cond = time(self._features(label).astype(dtype))
        cond = layers.with_class(cond, self.classes, condition)
        skips = [layers.Conv(widths[0], name="conv_in")(image)]
        for down in self._levels(Down, self.down_block_types, widths):
            found, image = down(skips[-1], image, cond, train)
            skips += found
        h = skips[-1]
        if self.mid_block_type != "none":
            h = self._middle()(h, cond, train)
        total: Array | None = None
        for up in self._levels(Up, self.up_block_types, widths[::-1]):
            read = [skips.pop() for _ in range(up.depth)]
            h, total = up(h, read, total, cond, train, head)
        out = head(h, groups=self.norm_num_groups, names=("conv_norm_out", "conv_out"))
        out = (out if total is None else out + total).astype(wide)
        if self.time_embedding_type == "fourier":
            out = out / label[:, None, None, None]
        return layers.per_entry(out, x.shape, self.outputs)

    @nn.nowrap
    def _features(self, label: Array) -> Array:
        size = self.block_out_channels[0]
        if self.time_embedding_type == "fourier":
            return layers.GaussianFourierProjection(size, name="time_proj")(jnp.log(label))
        features = layers.positional(label, size, self.freq_shift)
        features = jnp.roll(features, size // 2, axis=-1) if self.flip_sin_to_cos else features
        return jnp.pad(features, ((0, 0), (0, size % 2)))

    @nn.nowrap
    def _parts(
        self, attends: bool, scale: float, groups: int, norm: int | None, features: int = 0
    ) -> tuple[Callable[..., Resnet], Callable[..., Attention] | None]:
        """Residual blocks and attention, with ``groups`` and ``norm`` groups of their norms."""
        block = partial(
            layers.recomputed(Resnet, self.remat),
            act=ACTIVATIONS[self.act_fn],
            dropout=self.dropout,
            features=features,
            scale=scale,
            groups=(groups, groups),
            epsilon=self.norm_eps,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
        )
        attention = partial(Attention, scale, self.attention_head_dim, norm, self.norm_eps)
        return block, attention if attends else None

    @nn.nowrap
    def _levels(
        self, level: type[Level], kinds: tuple[str, ...], widths: tuple[int, ...]
    ) -> Iterator[Level]:
        side, chosen = ("up", self.upsample_type) if level.up else ("down", self.downsample_type)
        for i, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
            pyramid, groups = "Skip" in kind, self.norm_num_groups
            scale, groups, norm = (math.sqrt(2), 0, 32) if pyramid else (1.0, groups, groups)
            block, attention = self._parts(kind[:4] == "Attn", scale, groups, norm, width)
            how = {"Attn": chosen, "Resn": "resnet"}.get(kind[:4], "conv")
            how = "resnet" if pyramid else how
            yield level(
                block=block,
                attention=attention,
                depth=self.layers_per_block + level.up,
                how=how if i < len(kinds) - 1 else "none",
                pyramid=pyramid,
                padding=self.downsample_padding,
                name=f"{side}_blocks.{i}",
            )

    @nn.nowrap
    def _middle(self) -> Middle:
        groups, normed = self.norm_num_groups, self.resnet_time_scale_shift == "default"
        norm = self.attn_norm_num_groups or (groups if normed else None)
        scale = self.mid_block_scale_factor
        return Middle(*self._parts(self.add_attention, scale, groups, norm), name="mid_block")


# ---- diffusers' files ---------------------------------------------------------------------------

# Keys of a config without a field here: the data tell the size and the channels, there are no
# classes, and only "learned" features of the label, which are refused, read the number of steps.
_CLASSES = ("class_embed_type", "num_class_embeds")
_UNUSED = ("sample_size", "in_channels", "out_channels", "num_train_timesteps", *_CLASSES)
_NONE = {
    "mid_block_type": "none",
    "time_embedding_dim": 0,
    "attention_head_dim": 0,
    "norm_num_groups": 0,
    "attn_norm_num_groups": 0,
}
_OWN = ("parent", "name", "outputs", "dtype", "remat", "classes")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@typed
def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`Model` in ``config``, the content of diffusers' ``config.json``.

    Where it has no key, diffusers and :class:`Model` have the same default.

    Raises:
      ValueError: a key or value is not of an unconditional ``UNet2DModel``, or is not known.
    """
    kind = config.get("_class_name", "UNet2DModel")
    if kind != "UNet2DModel":
        raise ValueError(f"_class_name is {kind!r}: give the config.json of a UNet2DModel")
    inputs, outputs = (config.get(f"{end}_channels", 3) for end in ("in", "out"))
    if inputs != outputs:
        raise ValueError(
            f"in_channels is {inputs!r} and out_channels is {outputs!r}: give a network whose "
            "output has the shape of its input, without learned variances or conditions"
        )
    for key in _CLASSES:
        if config.get(key) is not None:
            raise ValueError(
                f"{key} is {brief(config[key])}: give a network without classes, with null"
            )
    known = [f.name for f in dataclasses.fields(Model) if f.name not in _OWN]
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in known:
            value = _NONE.get(key) if value is None else value
            found[key] = tuple(value) if isinstance(value, list) else value
        elif key not in _UNUSED and not key.startswith("_"):
            raise ValueError(f"{key} is {brief(value)}, but the known keys are {', '.join(known)}")
    Model(**found)
    return found


@typed
def params(state: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of :class:`Model`, float32, from diffusers' arrays by name.

    ``state`` is what ``safetensors.numpy.load_file`` reads, of any precision; it reads bfloat16 if
    JAX is imported. At the dots that no number follows, a name is split into the names of modules:
    ``down_blocks.0.resnets.1.conv1.weight (o, i, h, w)`` becomes ``kernel (h, w, i, o)`` of the
    module conv1 in resnets.1 in down_blocks.0. The names that old files have for the maps of
    attention are known too. Nothing is checked here: the reader of the file compares the arrays
    with the parameters of a model.
    """
    flat: dict[tuple[str, ...], np.ndarray] = {}
    for name, value in state.items():
        *path, leaf = (_OLD_NAMES.get(part, part) for part in re.split(r"\.(?!\d)", name))
        array = np.asarray(value, np.float32)
        if leaf == "weight":
            leaf = "scale" if array.ndim == 1 else "kernel"
        if path == ["time_proj"]:
            leaf = "W"
        flat[*path, leaf] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T
    return unflatten_dict(flat)
