"""Reads checkpoint files of other code as plain data, without pickle.

    DIR/checkpoints*/checkpoint_N        written by Song et al.'s code
    DIR/checkpoints*/ckpt-N.flax         written by VDM's code

Each is one msgpack file of flax that holds a whole training state as nested dictionaries of arrays.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

NAMES = "checkpoint_N or ckpt-N.flax"
_NUMBER = re.compile(r"(?:checkpoint_(\d+)|ckpt-(\d+)\.flax)")


class ForeignState(NamedTuple):
    """The training state in one checkpoint of other code.

    ``trees`` holds four nested dictionaries of arrays: the parameters ``params``, their average
    ``ema_params``, and Adam's running means after ``updates`` updates, ``mu`` of the gradient and
    ``nu`` of its square.
    """

    path: epath.Path
    step: int
    updates: int
    trees: dict[str, dict[str, Any]]

    @property
    def origin(self) -> dict[str, Any]:
        """The file, its step and its SHA-256, which its publisher may tell: msgpack files have no
        checksum of their own, so a changed value in them is not noticed."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": str(self.path), "step": self.step, "sha256": sha256}

    @property
    def ema_params(self) -> dict[str, Any]:
        return self.trees["ema_params"]


def newest(folder: epath.PathLike) -> epath.Path | None:
    """The checkpoint with the largest N in ``folder``; None if there is none."""
    folder = epath.Path(folder).expanduser()
    matches = [(_NUMBER.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    numbered = {int(m[1] or m[2]): p for m, p in matches if m and p.is_file()}
    return numbered[max(numbered)] if numbered else None


def find(source: epath.PathLike) -> epath.Path:
    """The file ``source`` itself, or the newest checkpoint in the folder ``source`` or in a folder
    ``checkpoints*/`` of it.

    Raises:
      ValueError: there is no checkpoint.
    """
    source = epath.Path(source).expanduser()
    if source.is_file():
        return source
    folders = sorted(source.glob("checkpoints*")) if source.exists() else []
    for folder in (*folders, source):
        if path := newest(folder):
            return path
    raise ValueError(
        f"no {NAMES} in {source} or in a folder checkpoints* of it: set --source to such a file, "
        "or to the work directory that holds checkpoints/"
    )


def load(path: epath.PathLike) -> dict[str, Any]:
    """The nested dictionaries in the file ``path``.

    Raises:
      ValueError: it is not a msgpack file of flax, or it holds something other than a dictionary.
    """
    path = epath.Path(path)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack raises many kinds of errors for bytes of other formats.
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path} is not a flax msgpack file ({reason}): check that the whole file was copied"
        ) from error
    if not isinstance(tree, dict):
        raise ValueError(
            f"{path} holds a {type(tree).__name__}, not a training state: give a checkpoint file"
        )
    return tree


def flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """The leaves of ``tree`` by their paths, tuples of names."""
    return flatten_dict(dict(tree))


def unwrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
    """``tree`` with NumPy arrays as leaves and without the outer level "params" if it has one."""
    inner = tree["params"] if set(tree) == {"params"} else tree
    return unflatten_dict({path: np.asarray(leaf) for path, leaf in flat(inner).items()})
