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
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sbml.core.types import Json, Tree
from sbml.networks.ncsnpp import Model
from sbml.program.runtime.trees import differences

BLOCKS = {"ResnetBlockBigGANpp": "biggan", "ResnetBlockDDPMpp": "ddpm"}
SHOWN = 30  # At most so many differences are listed in an error message.


def read_options(params: Tree, given: Json, height: int, channels: int = 3) -> Json:
    """Every field of the NCSN++ whose parameters are ``params``.

    Args:
      params: nested dictionaries of arrays, as ``Model.init`` returns them.
      given: fields of ``Model``, used for options that the parameters do not show.
      height: height of the images in pixels; it turns levels into ``attn_resolutions``.
      channels: channels of the images, used if the parameters have no first convolution.
    """
    with contextlib.suppress(KeyError, IndexError):
        channels = np.shape(params["Conv_0"]["kernel"])[2]
    image, mismatches = jnp.zeros((1, height, height, channels)), []
    for fields in _candidates(params, given, height):
        with contextlib.suppress(ValueError):  # No network has these fields.
            init = functools.partial(Model(**fields).init, train=False)
            shapes = jax.eval_shape(init, jax.random.key(0), image, jnp.ones(1))["params"]
            mismatches.append(differences(params, shapes))
            if not mismatches[-1]:
                return fields
    nearest = min(mismatches, key=len)
    more = [f"and {len(nearest) - SHOWN} more"] if len(nearest) > SHOWN else []
    raise ValueError(
        "no NCSN++ or DDPM++ has these parameters. Differences from the nearest:\n  "
        + "\n  ".join(nearest[:SHOWN] + more)
    )


def _candidates(params: Tree, given: Json, height: int) -> Iterator[Json]:
    """Fields of networks that may have these parameters, and then the ``given`` ones, so that an
    error message always has a network to compare with."""
    with contextlib.suppress(KeyError, IndexError):  # A leaf that options are read from is missing.
        for encoder in _encoders(params, height):
            attention = {"attn_resolutions": _attention(params, given, height, encoder)}
            yield {**given, **attention, **_layers(params, given, encoder)}
    yield dict(given)


def _named(params: Tree, kind: str) -> list[Tree]:
    """The modules ``kind_0``, ``kind_1`` ... in order."""
    modules = {n.removeprefix(f"{kind}_"): m for n, m in params.items() if n.startswith(f"{kind}_")}
    return [modules[number] for number in sorted(filter(str.isdecimal, modules), key=int)]


def _blocks(params: Tree) -> tuple[str, list[Tree]]:
    """The type of the residual blocks, and the blocks in the order of their calls."""
    found = {kind: _named(params, name) for name, kind in BLOCKS.items()}
    return next(((kind, blocks) for kind, blocks in found.items() if blocks), ("", []))


def _encoders(params: Tree, height: int) -> Iterator[Json]:
    """``nf``, ``ch_mult`` and ``num_res_blocks`` of every U-Net whose residual blocks have the
    widths of those in ``params``."""
    kind, modules = _blocks(params)
    widths = [np.shape(module["Conv_0"]["bias"])[-1] for module in modules]
    nf = np.shape(params["Conv_0"]["kernel"])[-1]
    between = kind == "biggan"  # Between two levels, one more block resamples.
    most_levels = height.bit_length()  # The image cannot be halved more often.
    for levels, blocks in itertools.product(range(1, 1 + most_levels), range(1, len(widths))):
        # Each level has ``blocks`` blocks in the encoder and one more in the decoder, and 2 are in
        # the middle. A block of the encoder and one of the decoder may resample between two levels.
        wide = [widths[min(i * (blocks + between), len(widths) - 1)] for i in range(levels)]
        down = [[w] * (blocks + (between and i < levels - 1)) for i, w in enumerate(wide)]
        up = [[w] * (blocks + 1 + (between and i > 0)) for i, w in enumerate(wide)]
        expected = sum(down, []) + [wide[-1]] * 2 + sum(reversed(up), [])
        if expected == widths and not any(w % nf for w in wide):
            multipliers = tuple(w // nf for w in wide)
            yield {"nf": nf, "ch_mult": multipliers, "num_res_blocks": blocks}


def _layers(params: Tree, given: Json, encoder: Json) -> Json:
    """The options that follow from which layers there are and how many of each kind."""
    kind, blocks = _blocks(params)
    halvings = len(encoder["ch_mult"]) - 1
    # An output head is a norm and a convolution. "none" has one; "output_skip" has one for each
    # level, all of which give images; "residual" has two, one of which gives an image.
    channels, heads = params["Conv_0"]["kernel"].shape[2], len(_named(params, "GroupNorm"))
    images = sum(conv["kernel"].shape[-1] == channels for conv in _named(params, "Conv"))
    progressive = "none" if heads <= 1 else "output_skip" if images == heads else "residual"
    # At each halving, "ddpm" blocks have one resampling layer, which has parameters if it is a
    # convolution, and a residual pyramid has another one, which always has.
    down, up = (_named(params, side) for side in ("Downsample", "Upsample"))
    of_blocks = halvings and kind == "ddpm"
    with_conv = bool(of_blocks) and len(up) // halvings > (progressive == "residual")
    progressive_input, combine = "none", given["progressive_combine"]
    if joined := _named(params, "Combine"):
        progressive_input = "input_skip"
        # The pyramid is first joined after the blocks of the first level and, with "biggan", the
        # block that halves the image. The next block reads image and pyramid side by side ("cat"),
        # which are twice the channels of the joined pyramid, or their sum.
        reader = blocks[encoder["num_res_blocks"] + (kind == "biggan")]
        inputs = np.shape(reader["Conv_0"]["kernel"])[2]
        combine = "cat" if inputs == 2 * joined[0]["Conv_0"]["kernel"].shape[-1] else "sum"
    elif halvings and len(down) // halvings > with_conv:
        progressive_input = "residual"
    fourier = _named(params, "GaussianFourierProjection")
    return {
        **encoder,
        "conditional": "Dense_0" in params or "Dense_1" in params,
        "embedding_type": "fourier" if fourier else "positional",
        "resblock_type": kind,
        "resamp_with_conv": with_conv if of_blocks else given["resamp_with_conv"],
        "fir": "Conv2d_0" in [*down, *up][0] if down or up else given["fir"],
        "progressive": progressive,
        "progressive_input": progressive_input,
        "progressive_combine": combine,
    }


def _attention(params: Tree, given: Json, height: int, encoder: Json) -> tuple[int, ...]:
    """The heights at which attention follows the blocks."""
    nf, ch_mult, num_res_blocks = encoder.values()
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
