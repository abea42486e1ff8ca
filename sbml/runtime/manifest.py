"""The manifest of a checkpoint, which reveals damage and checkpoints of other models.

It holds the checkpoint's step, the path, shape, dtype and CRC32 of every leaf of its state, and its
metadata. It also has a CRC32 of its own.
"""

import itertools
import json
import zlib
from typing import Any

import jax
from etils import epath
from jax.tree_util import keystr, tree_leaves_with_path

from sbml.runtime.trees import leaf_crc32

PyTree = Any


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose bytes have changed since it was saved."""


class OtherModelError(ValueError):
    """A checkpoint whose leaves are not those of the model that reads it."""


def create(step: int, state: PyTree, metadata: dict[str, Any]) -> dict[str, Any]:
    """The manifest of ``state``, as plain JSON values.

    Raises:
      ValueError: a leaf is not a ``jax.Array`` of numbers, or ``metadata`` is not finite JSON.
    """
    for path, leaf in tree_leaves_with_path(state):
        if not isinstance(leaf, jax.Array) or jax.numpy.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise ValueError(
                f"state leaf {keystr(path)} is {leaf!r}: give a jax.Array of numbers "
                "(jax.numpy.asarray of it, or jax.random.key_data of a key)"
            )
    crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
    body = {"step": step, "leaves": leaves_of(state), "crc32s": crc32s, "metadata": metadata}
    try:
        body = json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata {metadata} is not plain, finite JSON: {error}") from error
    return {"manifest": body, "crc32": _text_crc32(body)}


def content(manifest: Any, step: int) -> dict[str, Any]:
    """The content of the manifest that was read for the checkpoint of ``step``.

    Returns:
      ``step``, ``leaves``, ``crc32s`` and ``metadata``.

    Raises:
      DamagedCheckpointError: it is missing, was changed, or is of another step.
    """
    if not manifest:
        raise DamagedCheckpointError("its metadata holds no manifest")
    if _text_crc32(manifest["manifest"]) != manifest["crc32"]:
        raise DamagedCheckpointError("its metadata fails its CRC32")
    if (saved := manifest["manifest"].get("step")) != step:
        raise DamagedCheckpointError(f"it was saved as step {saved}: name its folder so again")
    return manifest["manifest"]


def check_same_model(path: epath.Path, stored: list[Any], expected: list[Any]) -> None:
    """Compare the leaves of the checkpoint at ``path`` with those of a model (:func:`leaves_of`).

    Raises:
      OtherModelError: they differ; the message names the first difference.
    """
    for leaf, model_leaf in itertools.zip_longest(stored, expected):
        if leaf != model_leaf:
            raise OtherModelError(
                f"{path} is of another model. First difference: it holds {_text(leaf)}, this "
                f"model has {_text(model_leaf)}. Use the configuration that saved it, or a new "
                "directory"
            )


def check_crc32s(stored: dict[str, Any], state: PyTree) -> None:
    """Compare the CRC32s of ``state`` with those of ``stored``, a manifest's content.

    Raises:
      DamagedCheckpointError: a leaf has another CRC32; the message names the first one.
    """
    # All are computed before the comparison, because all processes must take part in gathering.
    crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
    for leaf, expected, crc32 in zip(stored["leaves"], stored["crc32s"], crc32s, strict=True):
        if crc32 != expected:
            raise DamagedCheckpointError(f"{_text(leaf)} fails its CRC32")


def _text_crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def leaves_of(tree: PyTree) -> list[list[Any]]:
    """``[path, shape, dtype]`` of each leaf, in the types that JSON returns."""
    return [
        [keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in tree_leaves_with_path(tree)
    ]


def _text(leaf: list[Any] | None) -> str:
    """An entry of :func:`leaves_of` for a message; None if there is no further entry."""
    return "no further leaf" if leaf is None else "{0} {2}{1}".format(*leaf)
