"""Reads the options of an NCSN++ from its parameters: the inverse of building the network.

    widths, levels, blocks     from the residual blocks' kernels, in call order
    attention                  from the number of attention blocks and their widths
    resblock type, embedding, conditioning, pyramids, FIR      from the layers that are present

Some options do not change the parameters: dropout, rescaling, nonlinearity, the filter's taps,
resampling inside "biggan" blocks. The parameters also do not show at which of several equally wide
levels the attention is. For these options the given values are used. At the end, the parameters are
compared leaf by leaf with those of the network that the options describe.
"""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sbml.networks.ncsnpp import Model
from sbml.runtime.trees import differences

BLOCKS = {"ResnetBlockBigGANpp": "biggan", "ResnetBlockDDPMpp": "ddpm"}
SHOWN = 30  # At most so many differences are listed in an error message.
MOST_LEVELS = 12  # An image of 4096 x 4096 pixels cannot be halved more often.

Tree = Mapping[str, Any]


def read_options(
    params: Tree, given: Mapping[str, Any], height: int, channels: int = 3
) -> dict[str, Any]:
    """Every field of the NCSN++ whose parameters are ``params``.

    Args:
      params: nested dictionaries of arrays, as ``Model.init`` returns them.
      given: fields of ``Model``, used for options that the parameters do not show.
      height: height of the images in pixels; it turns levels into ``attn_resolutions``.
      channels: channels of the images, used if the parameters have no first convolution.

    Raises:
      ValueError: no NCSN++ has these parameters; the message lists the leaves that are missing,
        left over or misshapen in comparison with the nearest network. Or several networks have
        them; the message names the field to set.
    """
    mismatches: list[list[str]] = []
    with contextlib.suppress(KeyError, IndexError):  # A leaf that options are read from is missing.
        channels = np.shape(params["Conv_0"]["kernel"])[2]
        for shape in _encoders(params):
            fields: dict[str, Any] = {**given, **_layers(params, given, **shape)}
            fields["attn_resolutions"] = _attention(params, given, height, **shape)
            mismatches.append(differences(params, _parameters(fields, height, channels)))
            if not mismatches[-1]:
                return fields
    for near in ({}, *_nearby(params, height)):
        with contextlib.suppress(ValueError):  # No network has these fields.
            mismatches.append(differences(params, _parameters({**given, **near}, height, channels)))
    nearest = min(mismatches, key=len)
    more = [f"and {len(nearest) - SHOWN} more"] if len(nearest) > SHOWN else []
    raise ValueError(
        "no NCSN++ or DDPM++ has these parameters. Differences from the nearest:\n  "
        + "\n  ".join(nearest[:SHOWN] + more)
    )


def _parameters(fields: Mapping[str, Any], height: int, channels: int) -> Tree:
    """Shapes of the parameters of the network with these ``fields``."""
    options = (
        (name, tuple(value) if isinstance(value, list) else value) for name, value in fields.items()
    )
    return _shapes(tuple(options), height, channels)


@functools.lru_cache(maxsize=64)  # The parameters and their average ask for the same networks.
def _shapes(options: tuple[tuple[str, Any], ...], height: int, channels: int) -> Tree:
    x = jnp.zeros((1, height, height, channels))
    model = Model(**dict(options))
    init = jax.eval_shape(
        lambda key: model.init(key, x, jnp.ones(1), train=False), jax.random.key(0)
    )
    return init["params"]


def _named(params: Tree, kind: str) -> list[Tree]:
    """The modules ``kind_0``, ``kind_1`` ... in order."""
    numbers = {name: name.rpartition("_")[2] for name in params if _kind(name) == kind}
    modules = {int(number): params[name] for name, number in numbers.items() if number.isdecimal()}
    return [modules[i] for i in sorted(modules)]


def _kind(name: str) -> str:
    return name.rpartition("_")[0]


def _kernels(params: Tree) -> tuple[str, list[tuple[int, ...]]]:
    """The kind of the residual blocks and the shape of each one's first kernel."""
    for kind in BLOCKS:
        if blocks := _named(params, kind):
            return kind, [np.shape(block["Conv_0"]["kernel"]) for block in blocks]
    return "", []


def _encoders(params: Tree) -> Iterator[dict[str, Any]]:
    """``nf``, ``ch_mult`` and ``num_res_blocks`` of every U-Net whose blocks, in the order of their
    calls, have the widths of the blocks in ``params``."""
    kind, kernels = _kernels(params)
    if not kernels or "Conv_0" not in params:
        return
    nf = np.shape(params["Conv_0"]["kernel"])[-1]
    between = BLOCKS[kind] == "biggan"  # One more block between two levels resamples.
    widths = [kernel[-1] for kernel in kernels]
    for levels in range(1, MOST_LEVELS):
        # There are levels (2 blocks + 1) + 2 blocks, and 2 (levels - 1) more that resample.
        rest = len(widths) - 2 - levels - 2 * between * (levels - 1)
        blocks, odd = divmod(rest, 2 * levels)
        if odd or blocks < 1:
            continue
        wide = [widths[level * (blocks + between)] for level in range(levels)]
        down = [[w] * (blocks + (between and i < levels - 1)) for i, w in enumerate(wide)]
        up = [[w] * (blocks + 1 + (between and i > 0)) for i, w in enumerate(wide)]
        expected = sum(down, []) + [wide[-1]] * 2 + sum(reversed(up), [])
        if expected == widths and not any(w % nf for w in wide):
            yield {"nf": nf, "ch_mult": tuple(w // nf for w in wide), "num_res_blocks": blocks}


def _nearby(params: Tree, height: int) -> Iterator[dict[str, Any]]:
    """Fields of U-Nets with about as many blocks as ``params``, for the message that none fits."""
    kind = next((k for k in BLOCKS if _named(params, k)), "")
    leaves = (("Conv_0", "kernel"), ("Conv_0", "bias"), ("GroupNorm_1", "scale"))
    widths = []
    for block in _named(params, kind):
        sizes = [np.shape(block[m][leaf])[-1] for m, leaf in leaves if leaf in block.get(m, ())]
        widths += [width for width, _ in Counter(sizes).most_common(1)]
    if not widths:
        return
    nf, between = min(widths), BLOCKS[kind] == "biggan"
    steps = range(1, 1 + height.bit_length())
    for levels, blocks in itertools.product(steps, range(1, len(widths))):
        count = levels * (2 * blocks + 1) + 2 + 2 * between * (levels - 1)
        if abs(count - len(widths)) > 1:
            continue
        wide = [widths[min(i * (blocks + between), len(widths) - 1)] for i in range(levels)]
        shape = {"nf": nf, "ch_mult": tuple(w // nf for w in wide), "num_res_blocks": blocks}
        near = {"resblock_type": BLOCKS[kind], **shape, "conditional": "Dense_1" in params}
        with contextlib.suppress(KeyError, IndexError):
            near = _layers(params, {"progressive_combine": "sum", **near}, **shape)
        heights = [height >> level for level in range(levels)]
        for attending in ((), *((h,) for h in heights)):
            yield {**near, "attn_resolutions": attending}


def _layers(
    params: Tree,
    given: Mapping[str, Any],
    nf: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
) -> dict[str, Any]:
    """The options that follow from which layers there are and how many of each kind."""
    kind, kernels = _kernels(params)
    between = BLOCKS[kind] == "ddpm" and len(ch_mult) > 1  # Layers between the blocks resample.
    progressive = _progressive(params)
    # Resampling layers have parameters between "ddpm" blocks and along residual pyramids.
    down, up = (_named(params, side) for side in ("Downsample", "Upsample"))
    halvings = max(len(ch_mult) - 1, 1)
    with_conv = between and len(up) // halvings > (progressive == "residual")
    progressive_input, combine = "none", given["progressive_combine"]
    if joined := _named(params, "Combine"):
        progressive_input = "input_skip"
        inputs = kernels[num_res_blocks + (BLOCKS[kind] == "biggan")][2]
        combine = "cat" if inputs == 2 * joined[0]["Conv_0"]["kernel"].shape[-1] else "sum"
    elif len(down) // halvings > with_conv:
        progressive_input = "residual"
    fourier = _named(params, "GaussianFourierProjection")
    return {
        "nf": nf,
        "ch_mult": ch_mult,
        "num_res_blocks": num_res_blocks,
        "conditional": "Dense_0" in params or "Dense_1" in params,
        "embedding_type": "fourier" if fourier else "positional",
        "resblock_type": BLOCKS[kind],
        "resamp_with_conv": with_conv if between else given["resamp_with_conv"],
        "fir": "Conv2d_0" in [*down, *up][0] if down or up else given["fir"],
        "progressive": progressive,
        "progressive_input": progressive_input,
        "progressive_combine": combine,
    }


def _progressive(params: Tree) -> str:
    """The option ``progressive``, from the output heads (a norm and a convolution).

    "none" has one head; "output_skip" has one for each level, all of which give images; "residual"
    has two, one of which gives an image.
    """
    channels = params["Conv_0"]["kernel"].shape[2]
    heads = len(_named(params, "GroupNorm"))
    images = sum(conv["kernel"].shape[-1] == channels for conv in _named(params, "Conv"))
    if heads <= 1:
        return "none"
    return "output_skip" if images == heads else "residual"


def _attention(
    params: Tree,
    given: Mapping[str, Any],
    height: int,
    nf: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
) -> tuple[int, ...]:
    """The heights at which attention follows the blocks."""
    widths = [np.shape(block["NIN_0"]["W"])[0] for block in _named(params, "AttnBlockpp")]
    # A level with attention has it after each of its encoder's blocks and once in the decoder; one
    # more attention block is in the middle.
    count = (len(widths) - 1) // (num_res_blocks + 1)
    multipliers = [widths[i * num_res_blocks] // nf for i in range(count)]
    heights = [height >> level for level in range(len(ch_mult))]
    fitting = [
        tuple(heights[level] for level in levels)
        for levels in itertools.combinations(range(len(ch_mult)), count)
        if [ch_mult[level] for level in levels] == multipliers
    ]
    named = tuple(h for h in heights if h in given["attn_resolutions"])
    if named in fitting or len(fitting) == 1:
        return named if named in fitting else fitting[0]
    raise ValueError(
        f"the parameters have attention at {count} of the heights {heights} and do not tell which: "
        f"set attn_resolutions to one of {fitting or 'none'}"
    )
