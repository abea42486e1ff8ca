"""The network of "Variational Diffusion Models": residual blocks at one resolution.

    [x, sin, cos] ─ conv ─▶ block ─▶ ... ─▶ block ─▶ block, attention, block
                      │ skips                            │
    F ◀─ conv ◀─ norm ◀─ block ◀─ ... ◀─ block ◀─────────┘

The image keeps its size throughout. The blocks in the lower row also read the skips, the last ones
first. Every block reads the noise level and a class through one vector,

    cond = swish(dense(swish(dense([positional(label), class]))))

The published models predict the noise e = x + F (``score.parameterization=residual``). Parameters
are named as in the published checkpoints, so that their score model loads unchanged.

Reference: Kingma, Salimans, Poole, Ho, "Variational Diffusion Models", NeurIPS 2021, appendix B.
"""

from functools import partial
from typing import Annotated

import jax.numpy as jnp
from flax import linen as nn

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import at_least, one_of
from sbml.core.types import Array, at_least_float32
from sbml.networks import _layers as layers
from sbml.networks._layers import ZEROS, Images, Labels

GROUPS = 32  # of group norm, in the published models
LECUN = nn.initializers.lecun_normal()


def default_groups(width: int) -> int:
    """The largest number of groups, at most 32, that leaves two or more channels in each group.

    If a group had one channel, the norm would remove the constant that the condition adds to that
    channel, and the network would not depend on the noise level at all.
    """
    return max(g for g in range(1, GROUPS + 1) if width % g == 0 and width // g >= 2)


class Block(layers.ResidualBlock):
    """A residual block that adds W cond, where W starts at 0."""

    names = ("GroupNorm_0", "conv1", "cond_proj", "GroupNorm_1", "conv2", "nin_shortcut")

    @nn.nowrap
    def project(self, cond: Array, size: int, name: str) -> Array:
        return nn.Dense(size, use_bias=False, dtype=cond.dtype, kernel_init=ZEROS, name=name)(cond)

    @nn.nowrap
    def shortcut(self, x: Array, features: int, name: str) -> Array:
        return layers.dense(x, features, name, LECUN)


class Attention(layers.Attention):
    """Attention with one head."""

    names = ("GroupNorm_0", "q", "k", "v", "proj_out")

    @nn.nowrap
    def affine(self, x: Array, name: str, last: bool) -> Array:
        return layers.dense(x, x.shape[-1], name, ZEROS if last else LECUN)


@typed
class Model(nn.Module):
    """``F (n, h, w, c)`` of ``x (n, h, w, c)`` at noise label ``label (n,)``.

    Attributes:
      width: number of channels, even and at least 4.
      depth: number of blocks before the middle; after it there is one more.
      attention: whether attention also follows every block outside the middle, where there is
        always one.
      dropout: rate of dropout inside every block.
      groups: number of groups of the group norm, a divisor of ``width``; 0 means
        ``default_groups(width)``. Published models have 32 whatever their width.
      fourier: frequencies, in units of pi, of the input's features (``networks.frequencies``).
      classes: number of classes, whose embedding is added to ``cond``. 0 means an unconditional
        network, or a published one that reads its class as a number.
      outputs: how many numbers the network gives for every entry of x, along a new last axis; 0
        means one number, in the shape of x.
      dtype: "float32", "bfloat16" or "float64" arithmetic; the output is float32 or float64.
      remat: compute each block again for its gradient instead of storing its intermediate results.

    Raises:
      ValueError: ``groups`` does not divide ``width``.
    """

    width: Annotated[
        int, condition("among 4, 6, 8 ...", lambda width: width >= 4 and width % 2 == 0)
    ] = 128
    depth: layers.Depth = 32
    attention: bool = False
    dropout: layers.Rate = 0.1
    groups: Annotated[int, at_least(0)] = 0
    fourier: layers.Frequencies = ()
    classes: layers.Classes = 0
    outputs: int = 0
    dtype: Annotated[str, one_of("float32", "bfloat16", "float64")] = "float32"
    remat: bool = False

    def __post_init__(self) -> None:
        if self.groups and self.width % self.groups:
            raise ValueError(f"groups={self.groups}: give a divisor of width={self.width}, or 0")
        super().__post_init__()

    @checked
    @nn.compact
    def __call__(
        self, x: Images, label: Labels, *, train: bool, condition: layers.Numbers | None = None
    ) -> Array:
        """``condition (n,)`` is the class of each image, as a number. None means class 0, which
        the published models without classes also use."""
        dtype = jnp.dtype(self.dtype)
        number = jnp.zeros_like(label) if condition is None or self.classes else condition
        cond = layers.with_class(self._cond(label, number), self.classes, condition)
        groups = self.groups or default_groups(self.width)
        kind = partial(
            layers.recomputed(Block, self.remat),
            act=nn.swish,
            dropout=self.dropout,
            features=self.width,
            groups=(groups, groups),
        )

        def block(h: Array, name: str) -> Array:
            return kind(name=name)(h, cond, train)

        def attend(h: Array, name: str, attention: bool = self.attention) -> Array:
            return Attention(groups=groups, name=name)(h) if attention else h

        features = layers.input_features(x, self.fourier).astype(dtype)
        skips = [layers.Conv(self.width, name="conv_in")(features)]
        for i in range(self.depth):
            skips.append(attend(block(skips[-1], f"down.block_{i}"), f"down.attn_{i}"))
        h = attend(block(skips[-1], "mid.block_1"), "mid.attn_1", attention=True)
        h = block(h, "mid.block_2")
        for i in range(self.depth + 1):
            joined = jnp.concatenate([h, skips.pop()], axis=-1)
            h = attend(block(joined, f"up.block_{i}"), f"up.attn_{i}")
        size, names = x.shape[-1] * max(1, self.outputs), ("GroupNorm_0", "conv_out")
        out = layers.head(h, size, nn.swish, self.outputs, groups=groups, names=names)
        return at_least_float32(layers.per_entry(out, x.shape, self.outputs))

    @nn.nowrap
    def _cond(self, label: Array, condition: Array) -> Array:
        """The vector ``(n, 4 width)`` by which the blocks read the noise level and the class."""
        dtype = jnp.dtype(self.dtype)
        label = label.astype(jnp.promote_types(dtype, jnp.float32))
        inputs = [layers.positional(label, self.width), condition.astype(label.dtype)[:, None]]
        h = jnp.concatenate(inputs, axis=-1).astype(dtype)
        for name in ("dense0", "dense1"):
            h = nn.swish(layers.dense(h, 4 * self.width, name, LECUN))
        return h
