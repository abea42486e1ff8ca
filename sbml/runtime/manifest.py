"""What a checkpoint says about itself, so that damage and other models are noticed.

A manifest holds the checkpoint's step, the path, shape, dtype and CRC32 of every leaf of its state,
and its metadata. It has a CRC32 of its own.
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
    """A checkpoint that was whole when it was saved and is not any more."""


class OtherModelError(ValueError):
    """A checkpoint whose leaves are not those of the model at hand."""


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
    if (saved := manifest["manifest"].get("step", step)) != step:  # Earlier versions have none.
        raise DamagedCheckpointError(f"it was saved as step {saved}: name its folder so again")
    return manifest["manifest"]


def check_same_model(path: epath.Path, stored: list[Any], expected: list[Any]) -> None:
    """Compares two results of :func:`leaves_of`, of the checkpoint at ``path`` and of a model.

    Raises:
      OtherModelError: they differ; the message has the first difference.
    """
    for theirs, ours in itertools.zip_longest(stored, expected):
        if theirs != ours:
            raise OtherModelError(
                f"{path} is of another model. First difference: it holds {_shown(theirs)}, this "
                f"model has {_shown(ours)}. Use the configuration that saved it, or a new directory"
            )


def check_crc32s(stored: dict[str, Any], state: PyTree) -> None:
    """Compares the CRC32s of ``state`` with those of ``stored``, a manifest's content.

    Raises:
      DamagedCheckpointError: a leaf has another CRC32; the message names the first one.
    """
    # Of all leaves, because every process takes part where a leaf is gathered.
    found = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
    for described, expected, crc32 in zip(stored["leaves"], stored["crc32s"], found, strict=True):
        if crc32 != expected:
            raise DamagedCheckpointError(f"{_shown(described)} fails its CRC32")


def _text_crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def leaves_of(tree: PyTree) -> list[list[Any]]:
    """``[path, shape, dtype]`` of each leaf, as JSON would give it back."""
    return [
        [keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in tree_leaves_with_path(tree)
    ]


def _shown(described: list[Any] | None) -> str:
    return "no further leaf" if described is None else "{0} {2}{1}".format(*described)
