"""Comparison of two parameter trees: leaves that are missing, extra or of another shape."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

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
