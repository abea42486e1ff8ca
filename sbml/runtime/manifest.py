"""The manifest of a checkpoint, which reveals damage and checkpoints of other models.

It holds the checkpoint's step, the path, shape, dtype and CRC32 of every leaf of its state, and its
metadata. It also has a CRC32 of its own. Orbax stores it as the checkpoint's metadata.
"""

import itertools
import json
import zlib
from typing import Any

import jax
from etils import epath
from jax.tree_util import keystr, tree_leaves_with_path
from orbax.checkpoint.metadata import get_step_metadata

from sbml.runtime.trees import leaf_crc32

PyTree = Any


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose bytes have changed since it was saved."""


class OtherModelError(ValueError):
    """A checkpoint whose leaves are not those of the model that reads it."""


def create(step: int, state: PyTree, metadata: dict[str, Any]) -> dict[str, Any]:
    """The manifest of ``state``, as plain JSON values."""
    crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
    body = {"step": step, "leaves": leaves_of(state), "crc32s": crc32s, "metadata": metadata}
    body = json.loads(json.dumps(body, allow_nan=False))
    return {"manifest": body, "crc32": _text_crc32(body)}


def read(path: epath.Path) -> dict[str, Any]:
    """``step``, ``leaves``, ``crc32s`` and ``metadata`` of the manifest of the checkpoint ``path``,
    whose name is its step.

    Raises:
      DamagedCheckpointError: it is missing, was changed, or is of another step.
    """
    manifest = get_step_metadata(path).custom_metadata
    if not manifest:
        raise DamagedCheckpointError("its metadata holds no manifest")
    if _text_crc32(manifest["manifest"]) != manifest["crc32"]:
        raise DamagedCheckpointError("its metadata fails its CRC32")
    if str(saved := manifest["manifest"].get("step")) != path.name:
        raise DamagedCheckpointError(f"it was saved as step {saved}: name its folder so again")
    return manifest["manifest"]


def check_same_model(path: epath.Path, stored: list[Any], expected: list[Any]) -> None:
    """Raise an OtherModelError that names the first difference, if the leaves of the checkpoint at
    ``path`` are not those of a model (:func:`leaves_of`)."""
    for leaf, model_leaf in itertools.zip_longest(stored, expected):
        if leaf != model_leaf:
            raise OtherModelError(
                f"{path} is of another model. First difference: it holds {_text(leaf)}, this "
                f"model has {_text(model_leaf)}. Use the configuration that saved it, or a new "
                "directory"
            )


def check_crc32s(stored: dict[str, Any], state: PyTree) -> None:
    """Raise a DamagedCheckpointError that names the first leaf, if any, whose CRC32 in ``state`` is
    not that of ``stored``, a manifest's content."""
    # All are computed before the comparison, because all processes must take part in gathering.
    crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
    for leaf, expected, crc32 in zip(stored["leaves"], stored["crc32s"], crc32s, strict=True):
        if crc32 != expected:
            raise DamagedCheckpointError(f"{_text(leaf)} fails its CRC32")


def leaves_of(tree: PyTree) -> list[list[Any]]:
    """``[path, shape, dtype]`` of each leaf, in the types that JSON returns."""
    return [
        [keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in tree_leaves_with_path(tree)
    ]


def _text_crc32(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def _text(leaf: list[Any] | None) -> str:
    """An entry of :func:`leaves_of` for a message; None if there is no further entry."""
    return "no further leaf" if leaf is None else "{0} {2}{1}".format(*leaf)
