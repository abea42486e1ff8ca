"""Streams of random numbers: one for each purpose, by its name.

    stream(key, name) = fold_in(key, crc32(name))

JAX's ``split(key, n)[i]`` equals ``fold_in(key, i)``. So two purposes would draw the same numbers
if one of them split a key and the other folded a counter, such as the number of a step, into it.
The checksums of the names are far above every counter. So a purpose whose key is ``stream(key,
name)`` shares no key with another name, nor with a caller who splits ``key`` or folds counters into
it. Below its own stream a purpose may do either, but only one of the two.
"""

import zlib
from typing import Literal, get_args

import jax

from sbml.core.types import Key

Name = Literal[
    # Of the key of a seed: what the program, or ``Density``, does.
    "train",
    "train dequantizer",
    "parameters",
    "dequantizer parameters",
    "pilot",  # the draws from which the density of the bound's times is estimated
    "noise levels",  # the draws that show the loss at each noise level
    "sweep times",  # the points of all examples in a sweep, which give the bound's times
    "evaluation",
    "first batch",  # the check of a dequantizer
    "samples",
    "completions",
    # Of the key of a step, a batch or an example: what is drawn.
    "dequantization",
    "times",
    "shift",
    "order",
    "rows",
    "noise",
    "dropout",
    "probes",
    "target",
    "reconstruction",
    "bound",
    "latent",
    "sampler",
    "corrector",
    "known part",
]
VERSION = 2  # Rows and samples on disk name it, so that those of other draws are not used again.
CODES = {name: zlib.crc32(name.encode()) for name in get_args(Name)}


def stream(key: Key, name: Name) -> Key:
    """The key of the purpose ``name``, which is independent of the keys of all other names."""
    return jax.random.fold_in(key, CODES[name])
