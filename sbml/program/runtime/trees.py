"""Pytrees of arrays: the CRC32 of a pytree or a table, and the differences of two pytrees."""

import json
import zlib
from collections.abc import Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from sbml.core.types import PyTree, Tree


def differences(actual: Tree, expected: Tree) -> list[str]:
    """One line for each leaf in which two nested dictionaries of arrays differ; [] if they agree.

    Names and shapes are compared; the leaves may be ``jax.ShapeDtypeStruct``.
    """
    right, found = (
        {path: np.shape(leaf) for path, leaf in flatten_dict(dict(tree), sep="/").items()}
        for tree in (expected, actual)
    )
    return (
        [f"missing: {path} {right[path]}" for path in sorted(set(right) - set(found))]
        + [f"extra: {path} {found[path]}" for path in sorted(set(found) - set(right))]
        + [
            f"misshapen: {path} is {found[path]}, should be {right[path]}"
            for path in sorted(set(right) & set(found))
            if right[path] != found[path]
        ]
    )


def tree_crc32(tree: PyTree) -> int:
    """One CRC32 of the bytes of all leaves, to test whether two pytrees have the same arrays."""
    crc32s = [leaf_crc32(jax.numpy.asarray(leaf)) for leaf in jax.tree.leaves(tree)]
    return zlib.crc32(json.dumps(crc32s).encode())


def leaf_crc32(leaf: jax.Array) -> int:
    """CRC32 of the whole array's bytes in row-major order, which does not depend on its sharding.

    A replicated array is read from its local copy. An array that is spread over several processes
    is first gathered on each of them.
    """
    if leaf.is_fully_replicated:
        leaf = leaf.addressable_data(0)
    elif not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)


def table_crc32(columns: Mapping[str, np.ndarray]) -> int:
    """One CRC32 of named NumPy arrays of any types, with their names, types and shapes."""
    crc32 = 0
    for name in sorted(columns):
        column = np.asarray(columns[name])
        crc32 = zlib.crc32(f"{name} {column.dtype} {column.shape}".encode(), crc32)
        crc32 = zlib.crc32(column.tobytes(), crc32)
    return crc32
