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
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict

from sbml.door import checked, condition, typed
from sbml.networks import _layers as layers
from sbml.networks._layers import Images, Labels
from sbml.scalars import Count, Positive, at_least, between, one_of
from sbml.types import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
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
ZEROS = nn.initializers.zeros

Map = Callable[[Array], Array]


def _among(names: tuple[str, ...]) -> Any:
    words = f"of names among {', '.join(map(repr, names))}"
    return condition(words, lambda value: value and all(name in names for name in value))


def default_groups(channels: int) -> int:
    """The number of groups of a norm where ``norm_num_groups`` does not give it."""
    return min(channels // 4, 32)


def _norm(x: Array, groups: int, epsilon: float, name: str) -> Array:
    if groups == 0 or x.shape[-1] % groups:
        raise ValueError(
            f"{name} has {groups} groups for {x.shape[-1]} channels: choose block_out_channels, "
            "and norm_num_groups or attn_norm_num_groups, so that every norm's groups have equal "
            "size; AttnSkipDownBlock2D and AttnSkipUpBlock2D need multiples of 32 channels"
        )
    options: dict[str, Any] = {"dtype": x.dtype, "use_fast_variance": False, "name": name}
    return nn.GroupNorm(groups, epsilon=epsilon, **options)(x)


def _dense(features: int, x: Array, name: str, init: Any = None) -> Array:
    return nn.Dense(features, dtype=x.dtype, kernel_init=init or layers.fan_avg(), name=name)(x)


class TimeEmbedding(nn.Module):
    """dense(silu(dense(x))), from the features of the label to the vector that blocks read."""

    features: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return _dense(self.features, nn.silu(_dense(self.features, x, "linear_1")), "linear_2")


class Resnet(nn.Module):
    """(x + conv(dropout(act(norm(conv(act(norm(x))) + dense(act(cond))))))) / scale.

    If ``scale_shift``, the vector dense(act(cond)) = [a, b] acts after the second norm, as
    (1 + a) norm(...) + b. ``resample`` acts on x and before the first convolution. If the number of
    channels changes, or if ``shortcut``, x goes through a linear map.

    Attributes:
      groups: numbers of groups of both norms.
    """

    features: int
    groups: tuple[int, int]
    act: str
    epsilon: float
    dropout: float
    scale_shift: bool
    scale: float = 1.0
    resample: Map | None = None
    shortcut: bool = False

    @nn.compact
    def __call__(self, x: Array, cond: Array, train: bool) -> Array:
        act, resample = ACTIVATIONS[self.act], self.resample or (lambda h: h)
        h = resample(act(_norm(x, self.groups[0], self.epsilon, "norm1")))
        h = layers.Conv(self.features, name="conv1")(h)
        size = self.features * (2 if self.scale_shift else 1)
        shift = _dense(size, act(cond), "time_emb_proj")[:, None, None, :]
        if self.scale_shift:
            gain, shift = jnp.split(shift, 2, axis=-1)
            h = _norm(h, self.groups[1], self.epsilon, "norm2") * (1 + gain) + shift
        else:
            h = _norm(h + shift, self.groups[1], self.epsilon, "norm2")
        h = nn.Dropout(self.dropout, deterministic=not train)(act(h))
        h = layers.Conv(self.features, init_scale=0.0, name="conv2")(h)
        x = resample(x)
        if self.shortcut or x.shape != h.shape:
            x = layers.Conv(self.features, 1, name="conv_shortcut")(x)
        return (x + h) / self.scale


class Attention(nn.Module):
    """(x + W [softmax(q kᵀ / √d) v for every head]) / scale, over all pixels of an image.

    Attributes:
      head_dim: number of channels d of every head; 0 means one head with all channels.
      groups: number of groups of the norm before q, k and v; 0 means no norm.
    """

    head_dim: int
    groups: int
    epsilon: float
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n, h, w, c = x.shape
        d = self.head_dim or c
        if c % d:
            raise ValueError(f"attention_head_dim={d}: give a divisor of {c} channels, or 0")
        normed = _norm(x, self.groups, self.epsilon, "group_norm") if self.groups else x
        normed = normed.reshape(n, h * w, c)

        def heads(name: str) -> Array:
            split = _dense(c, normed, name).reshape(n, h * w, c // d, d)
            return split.swapaxes(1, 2).reshape(-1, h * w, d)

        mixed = layers.attention(heads("to_q"), heads("to_k"), heads("to_v"))
        mixed = mixed.reshape(n, c // d, h * w, d).swapaxes(1, 2).reshape(n, h * w, c)
        return (x + _dense(c, mixed, "to_out.0", ZEROS).reshape(x.shape)) / self.scale


class Resample(nn.Module):
    """A convolution that halves the image, or doubling by nearest neighbours and a convolution.

    Attributes:
      padding: 1 halves with zeros on all sides, 0 with zeros on the right and at the bottom only.
    """

    up: bool
    padding: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        c = x.shape[-1]
        if self.up:
            return layers.Conv(c, name="conv")(layers.upsample(x, None))
        zeros = (self.padding, 1)
        return layers.Conv(c, stride=2, padding=(zeros, zeros), name="conv")(x)


class _Level(nn.Module):
    """What down and up blocks share.

    Attributes:
      kind: diffusers' name of the block, which tells whether it has attention and pyramids.
      features: number of channels of the result.
      depth: number of residual blocks.
      resamples: whether the block changes the size of the image; the last down block and the last
        up block do not.
      how: "conv" resamples by a convolution between blocks, "resnet" inside a residual block.
      groups: number of groups of the norms; those of "Skip" blocks have ``default_groups``.
      resnet, attention: the modules with the options that all levels share.
      padding: of the convolution that halves the image.
    """

    kind: str
    features: int
    depth: int
    resamples: bool
    how: str
    groups: int
    resnet: Callable[..., Any]
    attention: Callable[..., Any]
    padding: int = 1

    @property
    def pyramid(self) -> bool:
        return "Skip" in self.kind

    @property
    def attends(self) -> bool:
        return self.kind.startswith("Attn")

    @nn.nowrap
    def block(self, h: Array, cond: Array, train: bool, name: str, **options: Any) -> Array:
        scale, groups = 1.0, (self.groups, self.groups)
        if self.pyramid:
            scale = math.sqrt(2)
            groups = (default_groups(h.shape[-1]), default_groups(self.features))
        options = {"scale": scale, "groups": groups, **options}
        return self.resnet(self.features, name=name, **options)(h, cond, train)

    @nn.nowrap
    def attend(self, h: Array, name: str) -> Array:
        groups, scale = (32, math.sqrt(2)) if self.pyramid else (self.groups, 1.0)
        return self.attention(groups=groups, scale=scale, name=name)(h)


class Down(_Level):
    """A level of the encoder. It reads features, the image at their size, and the condition, and
    returns the features after every residual block and after the halving, and the image at their
    size."""

    @nn.compact
    def __call__(
        self, h: Array, image: Array, cond: Array, train: bool
    ) -> tuple[list[Array], Array]:
        found = []
        for i in range(self.depth):
            h = self.block(h, cond, train, f"resnets.{i}")
            h = self.attend(h, f"attentions.{i}") if self.attends else h
            found.append(h)
        if not self.resamples:
            return found, image
        if self.pyramid:
            halve = partial(layers.downsample, fir_kernel=FIR)
            image = halve(image)
            h = self.block(h, cond, train, "resnet_down", resample=halve, shortcut=True)
            h = layers.Conv(self.features, 1, name="skip_conv")(image) + h
        elif self.how == "resnet":
            halve = partial(layers.downsample, fir_kernel=None)
            h = self.block(h, cond, train, "downsamplers.0", resample=halve)
        else:
            h = Resample(up=False, padding=self.padding, name="downsamplers.0")(h)
        return [*found, h], image


class Middle(nn.Module):
    """A residual block, and a second one after attention, which is optional.

    Attributes:
      groups, attention_groups: numbers of groups of the norms.
    """

    groups: int
    attention_groups: int
    scale: float
    attends: bool
    resnet: Callable[..., Any]
    attention: Callable[..., Any]

    @nn.compact
    def __call__(self, h: Array, cond: Array, train: bool) -> Array:
        block = partial(self.resnet, h.shape[-1], (self.groups, self.groups), scale=self.scale)
        h = block(name="resnets.0")(h, cond, train)
        if self.attends:
            groups, scale = self.attention_groups, self.scale
            h = self.attention(groups=groups, scale=scale, name="attentions.0")(h)
        return block(name="resnets.1")(h, cond, train)


class Up(_Level):
    """A level of the decoder. It reads features, the encoder's ``skips``, the output's image at
    half its size (None before the first), and the condition; it returns features and the image."""

    @nn.compact
    def __call__(
        self,
        h: Array,
        skips: list[Array],
        image: Array | None,
        cond: Array,
        train: bool,
        to_image: Callable[..., Array],
    ) -> tuple[Array, Array | None]:
        for i, skip in enumerate(reversed(skips)):
            options = {}
            if self.kind == "AttnSkipUpBlock2D":
                # As diffusers has it: only the second number is divided.
                first = min(h.shape[-1] + skip.shape[-1] // 4, 32)
                options["groups"] = (first, default_groups(self.features))
            joined = jnp.concatenate([h, skip], axis=-1)
            h = self.block(joined, cond, train, f"resnets.{i}", **options)
            if self.attends and not self.pyramid:
                h = self.attend(h, f"attentions.{i}")
        if self.attends and self.pyramid:
            h = self.attend(h, "attentions.0")
        if self.pyramid and image is not None:
            image = layers.upsample(image, FIR)
        if not self.resamples:
            return h, image
        if self.pyramid:
            part = to_image(h, default_groups(self.features), "skip_norm", "skip_conv")
            image = part if image is None else image + part
            double = partial(layers.upsample, fir_kernel=FIR)
            return self.block(h, cond, train, "resnet_up", resample=double, shortcut=True), image
        if self.how == "resnet":
            double = partial(layers.upsample, fir_kernel=None)
            return self.block(h, cond, train, "upsamplers.0", resample=double), image
        return Resample(up=True, name="upsamplers.0")(h), image


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
      freq_shift: the i-th of m positional frequencies is 10000^(-i / (m - freq_shift)).
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
            "of positive integers, the first even and at least 4",
            lambda widths: widths and min(widths) > 0 and widths[0] >= 4 and widths[0] % 2 == 0,
        ),
    ] = (224, 448, 672, 896)
    layers_per_block: Count = 2
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
                f"block_out_channels={widths}, down_block_types={down} and up_block_types={up}: "
                "give one of each per level"
            )
        down_skip, up_skip = [k in DOWN_SKIP for k in down], [k in UP_SKIP for k in up]
        if down_skip != sorted(down_skip, reverse=True) or up_skip != sorted(up_skip):
            raise ValueError(
                f"down_block_types={down} and up_block_types={up}: give the down blocks with Skip "
                "before those without, and the up blocks with Skip after those without"
            )
        if self.norm_num_groups == 0 and not all(down_skip + up_skip):
            raise ValueError(
                f"norm_num_groups=0 with down_block_types={down} and up_block_types={up}: give the "
                "number of groups, which only blocks with Skip do without"
            )
        super().__post_init__()

    @checked
    @nn.compact
    def __call__(
        self, x: Images, label: Labels, *, train: bool, condition: layers.Numbers | None = None
    ) -> Array:
        self._check_input(x)
        dtype = jnp.dtype(self.dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        widths, label = self.block_out_channels, label.astype(wide)
        image = (2 * x - 1 if self.center_input_sample else x).astype(dtype)
        channels = x.shape[-1] * max(1, self.outputs)

        def to_image(h: Array, groups: int, norm: str, conv: str) -> Array:
            h = nn.silu(_norm(h, groups, self.norm_eps, norm))
            # The means of a mixture over 256 levels need more digits than bfloat16 has.
            h = h.astype(wide) if self.outputs else h
            return layers.Conv(channels, init_scale=0.0, name=conv)(h)

        time = TimeEmbedding(self.time_embedding_dim or 4 * widths[0], name="time_embedding")
        cond = time(self._features(label).astype(dtype))
        cond = layers.with_class(cond, self.classes, condition)
        skips = [layers.Conv(widths[0], name="conv_in")(image)]
        for level in self._levels(Down, self.down_block_types, widths):
            found, image = level(skips[-1], image, cond, train)
            skips += found
        h = skips[-1]
        if self.mid_block_type != "none":
            h = self._middle(h.shape[-1])(h, cond, train)
        total: Array | None = None
        for level in self._levels(Up, self.up_block_types, widths[::-1]):
            skips, read = skips[: -level.depth], skips[-level.depth :]
            h, total = level(h, read, total, cond, train, to_image)
        groups = self.norm_num_groups or default_groups(widths[0])
        out = to_image(h, groups, "conv_norm_out", "conv_out")
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
        return jnp.roll(features, size // 2, axis=-1) if self.flip_sin_to_cos else features

    @nn.nowrap
    def _parts(self) -> dict[str, Any]:
        """Residual blocks and attention, with the options that all levels share."""
        resnet = partial(
            nn.remat(Resnet, static_argnums=(3,)) if self.remat else Resnet,
            act=self.act_fn,
            epsilon=self.norm_eps,
            dropout=self.dropout,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
        )
        attention = partial(Attention, head_dim=self.attention_head_dim, epsilon=self.norm_eps)
        return {"resnet": resnet, "attention": attention}

    @nn.nowrap
    def _levels(
        self, level: type[_Level], kinds: tuple[str, ...], widths: tuple[int, ...]
    ) -> Iterator[Any]:
        prefix, more, chosen = (
            ("down", 0, self.downsample_type) if level is Down else ("up", 1, self.upsample_type)
        )
        for i, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
            yield level(
                kind=kind,
                features=width,
                depth=self.layers_per_block + more,
                resamples=i < len(kinds) - 1,
                how={"Attn": chosen, "Resn": "resnet"}.get(kind[:4], "conv"),
                groups=self.norm_num_groups,
                padding=self.downsample_padding,
                name=f"{prefix}_blocks.{i}",
                **self._parts(),
            )

    @nn.nowrap
    def _middle(self, channels: int) -> Middle:
        groups = self.norm_num_groups or default_groups(channels)
        normed = self.resnet_time_scale_shift == "default"
        return Middle(
            groups=groups,
            attention_groups=self.attn_norm_num_groups or (groups if normed else 0),
            scale=self.mid_block_scale_factor,
            attends=self.add_attention,
            name="mid_block",
            **self._parts(),
        )

    @nn.nowrap
    def _check_input(self, x: Array) -> None:
        factor = 2 ** (len(self.block_out_channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f"images of {x.shape[1]}x{x.shape[2]} cannot be halved between all levels: crop or "
                f"pad height and width to a multiple of {factor}, or choose fewer levels than "
                f"block_out_channels={self.block_out_channels}"
            )


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
            raise ValueError(f"{key} is {config[key]!r}: give a network without classes, with null")
    known = [f.name for f in dataclasses.fields(Model) if f.name not in _OWN]
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in known:
            value = _NONE.get(key) if value is None else value
            found[key] = tuple(value) if isinstance(value, list) else value
        elif key not in _UNUSED and not key.startswith("_"):
            raise ValueError(f"{key} is {value!r}, but the known keys are {', '.join(known)}")
    Model(**found)
    return found


@typed
def params(state: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of :class:`Model`, float32, from diffusers' arrays by name.

    ``state`` is what ``safetensors.numpy.load_file`` reads, of any precision; it reads bfloat16 if
    JAX is imported. At the dots that no number follows, a name is split into the names of modules:
    ``down_blocks.0.resnets.1.conv1.weight (o, i, h, w)`` becomes ``kernel (h, w, i, o)`` of the
    module conv1 in resnets.1 in down_blocks.0. The names that old files have for the maps of
    attention are known too. Nothing is checked here: ``sbml.runtime.trees.differences`` names the
    arrays that do not fit the parameters of a model.
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
