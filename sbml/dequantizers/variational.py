"""Variational dequantization by Flow++: u = sigmoid(flow(eps; pixels)), eps ~ N(0, I).

log q(u | pixels) = log N(eps; 0, I) - log |det du/deps|, both in nats, so that for any density p

    -log P(pixels) <= E_q [-log p(pixels + u) + log q(u | pixels)].

Reference: Ho et al. 2019 (Flow++), sections 3.1 to 3.3; Song et al. 2021 train it for a fixed score
model. ``from_reference`` reads the parameters in Song et al.'s checkpoints.
"""

import contextlib
import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, cast

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn import log_sigmoid
from jax.typing import DTypeLike
from jaxtyping import Float, Integer, Num

from sbml.core.door import checked, condition, typed
from sbml.core.scalars import Count, at_least, between
from sbml.core.streams import stream
from sbml.core.types import AnyArray, Array, Json, Key, Keys, Numbers, PyTree, Scalar, Tree, Vector
from sbml.dequantizers._flowpp_flow import Flow, per_image
from sbml.dequantizers._flowpp_layers import DESIGNS
from sbml.dequantizers.base import Dequantizer

Pixels = Integer[AnyArray, "n h w c"]
Images = Float[AnyArray, "n h w c"]


@typed
@dataclasses.dataclass(frozen=True)
class Model(Dequantizer):
    """The Flow++ dequantizer; the defaults are those for CIFAR-10, with 3,466,976 parameters.

    For ImageNet 32x32 it is ``Model("imagenet32", filters=128, blocks=8)``, with 35,482,720
    parameters. Both counts are for images of 32x32x3.

    Attributes:
      design: ``cifar10`` or ``imagenet32``, see ``_flowpp_layers``.
      filters, blocks, heads: width, depth and attention heads of each coupling's network. The
        design determines the size of the context network.
      components: number of logistics in the mixture of every element.
      dropout: rate of dropout in training.
      levels: number of levels L of the integers k; the networks see k / (L - 1) - 1/2.
      clipped: compute the mixture's distribution function in float32 and clip it at 1e-7, as Song
        et al. do, for parity with their numbers. log q is then wrong where a logit exceeds 16 in
        magnitude.
    """

    design: Annotated[
        str, condition(f"among {', '.join(DESIGNS)}", lambda name: name in DESIGNS)
    ] = "cifar10"
    filters: Count = 96
    components: Count = 32
    blocks: Annotated[int, between(1, 100)] = 2
    heads: Count = 4
    dropout: Annotated[float, condition("in [0, 1)", lambda rate: 0 <= rate < 1)] = 0.0
    levels: Annotated[int, at_least(2)] = 256
    clipped: bool = False

    def __post_init__(self) -> None:
        if self.filters % self.heads:
            raise ValueError(
                f"filters={self.filters} is not a multiple of heads={self.heads}: give one"
            )

    @classmethod
    def misfit(cls, shape: tuple[int, ...], parameterization: str, dequantization: str) -> str:
        """The reason why the flow cannot split images of ``shape``, or ""."""
        if shape[1] % 2 == 0:
            return ""
        return (
            f"data.shape={shape}: its flow splits images into even and odd columns, so their width "
            "must be even; choose another dequantizer, or set another data.shape"
        )

    def image(self, pixels: Numbers, dtype: DTypeLike = jnp.float32) -> Float[Array, "..."]:
        """The input of the networks: ``pixels``, 0 ... levels - 1, scaled to [-1/2, 1/2]."""
        return jnp.asarray(pixels, dtype) / (self.levels - 1) - 0.5

    @checked
    def init(self, key: Key, pixels: Num[AnyArray, "n h w c"]) -> PyTree:
        """Initial parameters, from the batch ``pixels (n, h, w, c)`` and one draw of noise for it.

        For that batch and noise, each channel has mean 0 and variance 1 after every activation
        normalisation.
        """
        if pixels.shape[2] % 2:
            raise ValueError(
                f"pixels of shape {pixels.shape}: initialise with a batch (n, h, w, c) of images "
                "whose width w is even, because the flow splits them into even and odd columns."
            )
        noise = jax.random.normal(stream(key, "noise"), pixels.shape)
        return Flow(self).init(stream(key, "parameters"), self.image(pixels), noise)["params"]

    @checked
    def forward(
        self, params: PyTree, pixels: Pixels, eps: Images, dropout_key: Key | None = None
    ) -> tuple[Images, Vector]:
        """The u in [0, 1) that the flow makes of the noise ``eps``, and log q(u | pixels) in nats.

        Args:
          params: from ``init``, training or ``from_reference``.
          pixels: integers ``(n, h, w, c)``.
          eps: standard normal noise of that shape; the computation is in its dtype.
          dropout_key: for training; None means no dropout.

        Returns:
          u ``(n, h, w, c)`` and log q ``(n,)``. A u that rounds to 1 is replaced by the largest
          floating-point number below 1.
        """
        train = dropout_key is not None
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        image = self.image(pixels, eps.dtype)
        found = Flow(self).apply({"params": params}, image, eps, rngs=rngs, train=train)
        logits, log_det = cast(tuple[Array, Array], found)
        u = jnp.minimum(jax.nn.sigmoid(logits), 1.0 - jnp.finfo(eps.dtype).epsneg)
        log_normal = -0.5 * (jnp.square(eps) + math.log(2 * math.pi))
        return u, per_image(log_normal - log_sigmoid(logits) - log_sigmoid(-logits)) - log_det

    @checked
    def sample(
        self, params: PyTree, pixels: Integer[AnyArray, "h w c"], key: Key
    ) -> tuple[Float[Array, "h w c"], Scalar]:
        """u of the shape of one example ``pixels (h, w, c)``, and log q(u | pixels) () in nats."""
        u, log_q = self.sample_batch(params, pixels[None], key[None])
        return u[0], log_q[0]

    @checked
    def sample_batch(
        self, params: PyTree, pixels: Pixels, keys: Keys, *, train: bool = False
    ) -> tuple[Images, Vector]:
        """``sample`` for ``pixels (n, h, w, c)`` with ``keys (n,)``, one per image, in one call.

        Without dropout, the u of an image does not depend on the other images. Returns u
        ``(n, h, w, c)`` and log q ``(n,)``.
        """
        eps = jax.vmap(lambda key: jax.random.normal(stream(key, "noise"), pixels.shape[1:]))(keys)
        return self.forward(params, pixels, eps, stream(keys[0], "dropout") if train else None)


LEAVES = {"W": "kernel", "V": "direction", "b": "bias", "g": "scale"}
BLOCK = r"block\d+_(?:conv|attn)|c\d+|dqattn\d+"
LAYER = re.compile(rf"(?:(?P<block>{BLOCK})_)?(?P<layer>\w+)_(?P<leaf>[WVbg])")
# First and last layers of a coupling's network: (name in Song et al.'s ImageNet flow, name here).
ENDS = ((r"c1", "proj_in"), (r"(block\d+)_c2", r"\1_proj_out"))


def from_reference(params: Mapping[str, Mapping[str, AnyArray]]) -> dict[str, PyTree]:
    """Parameters of this flow from those of Song et al.'s Flow++ dequantizers.

    Modules have the same names. Inside a module, ``block0_conv_c1_W`` becomes
    ``block0_conv/c1/kernel``, ``_V`` becomes a direction, ``_b`` a bias and ``_g`` a scale. Spatial
    kernels ``_W`` are transposed (only the CIFAR-10 flow has them, and its code reads images as
    NWHC), and the parameters of layer normalisations lose their axes of size 1. All other
    parameters keep their shape. Names and shapes are not checked.

    Args:
      params: two levels of names, as in ``params_ema/params`` of their checkpoint.
    """

    def translate(module: str, name: str, value: AnyArray) -> tuple[tuple[str, ...], AnyArray]:
        match = LAYER.fullmatch(name)
        if match is None:
            return (module, name), value
        layer = match["layer"]
        if match["leaf"] == "W" and value.ndim == 4:
            value = value.transpose(1, 0, 2, 3)
        if re.search(r"ln\d+$", layer):
            value = value.reshape(-1)
        if match["block"]:
            return (module, match["block"], layer, LEAVES[match["leaf"]]), value
        for pattern, replacement in ENDS:
            layer = re.sub(f"^{pattern}$", replacement, layer)
        return (module, layer, LEAVES[match["leaf"]]), value

    # A leaf that is not two levels deep keeps its path; the check of names reports it later.
    flat = flatten_dict(dict(params)).items()
    return unflatten_dict(
        dict(translate(p[0], p[1], v) if len(p) == 2 else (p, v) for p, v in flat)
    )


def read_options(params: Tree, given: Mapping[str, object]) -> Json:
    """The fields of the :class:`Model` whose parameters, under the names used here, are ``params``.

    The parameters do not show the number of heads, so it is taken from ``given``.

    Raises:
      ValueError: ``params`` have no context network, no normalisation or no coupling.
    """
    designs = [name for name, design in DESIGNS.items() if design.context in params]
    if not designs:
        raise ValueError(f"no Flow++ dequantizer has the parameters {', '.join(sorted(params))}")
    channels = image_shape(params)[-1]

    def sizes(coupling: Tree) -> tuple[int, int, int]:
        blocks = sum(name.endswith("_conv") for name in coupling)
        outputs = coupling[f"block{blocks - 1}_proj_out"]["bias"].shape[-1]
        return coupling["proj_in"]["bias"].shape[-1], (outputs // channels - 2) // 3, blocks

    filters, components, blocks = _majority(params, "MixLogisticAttnCoupling", sizes)
    return {
        "design": designs[0],
        "heads": given["heads"],
        "filters": filters,
        "components": components,
        "blocks": blocks,
    }


def _majority(
    params: Tree, kind: str, read: Callable[[Tree], tuple[int, int, int]]
) -> tuple[int, int, int]:
    """The most frequent result of ``read`` over the modules ``kind_i``.

    A damaged module then does not decide; the later comparison of all leaves reports it.
    """
    readings: Counter[tuple[int, int, int]] = Counter()
    for name in sorted(params):
        if name.startswith(f"{kind}_"):
            with contextlib.suppress(KeyError, IndexError, ValueError, AttributeError):
                readings[read(params[name])] += 1
    if not readings:
        raise ValueError(f"no {kind} of a Flow++ dequantizer in {', '.join(sorted(params))}")
    return readings.most_common(1)[0][0]


def image_shape(params: Tree) -> tuple[int, int, int]:
    """(h, w, c) of the images that ``params`` fit: they hold a bias for every pixel."""

    def shape(module: Tree) -> tuple[int, int, int]:
        h, half, c = module["norm0"]["bias"].shape
        return h, 2 * half, c

    return _majority(params, "Norm", shape)
