"""Pytrees of arrays: the CRC32 of one, and the leaves in which two of them differ."""

import json
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

Tree = Mapping[str, Any]


def differences(found: Tree, expected: Tree) -> list[str]:
    """One line for each leaf in which two nested dictionaries of arrays differ; none if they agree.

    Compares names and shapes; the leaves may be ``jax.ShapeDtypeStruct``.
    """
    ours, theirs = (  # expected, found
        {path: np.shape(leaf) for path, leaf in flatten_dict(dict(tree), sep="/").items()}
        for tree in (expected, found)
    )
    return (
        [f"missing: {path} {ours[path]}" for path in sorted(set(ours) - set(theirs))]
        + [f"extra: {path} {theirs[path]}" for path in sorted(set(theirs) - set(ours))]
        + [
            f"misshapen: {path} is {theirs[path]}, should be {ours[path]}"
            for path in sorted(set(ours) & set(theirs))
            if ours[path] != theirs[path]
        ]
    )


def tree_crc32(tree: Any) -> int:
    """One CRC32 of every leaf's bytes, to tell whether two sets of arrays are the same."""
    crc32s = [leaf_crc32(jax.numpy.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return zlib.crc32(json.dumps(crc32s).encode())


def leaf_crc32(leaf: jax.Array) -> int:
    """CRC32 of the whole array's bytes in row-major order, however it is sharded.

    A replicated array is read from its local copy. One spread over several processes is gathered
    on each of them, a leaf at a time, so that the value does not depend on the sharding.
    """
    if leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)
    elif not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
