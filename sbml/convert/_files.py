"""Checkpoint files of others' code, read as plain data: nothing is unpickled.

    DIR/checkpoints*/checkpoint_N        Song et al.'s
    DIR/checkpoints*/ckpt-N.flax         VDM's

Each is one msgpack file of flax: nested dictionaries of arrays, a whole training state.
"""

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
    """One checkpoint of theirs.

    ``trees`` are four nested dictionaries of arrays under their names: ``params``, ``ema_params``,
    and Adam's running means ``mu`` of the gradient and ``nu`` of its square after so many
    ``updates``.
    """

    path: epath.Path
    step: int
    updates: int
    trees: dict[str, dict[str, Any]]

    @property
    def ema_params(self) -> dict[str, Any]:
        return self.trees["ema_params"]


def newest(folder: epath.PathLike) -> epath.Path | None:
    """The checkpoint of the largest N in ``folder``; None where there is none."""
    folder = epath.Path(folder).expanduser()
    matches = [(_NUMBER.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    numbered = {int(m[1] or m[2]): p for m, p in matches if m}
    return numbered[max(numbered)] if numbered else None


def find(source: epath.PathLike) -> epath.Path:
    """The file ``source`` itself, or the newest checkpoint in a folder or its ``checkpoints*/``.

    Raises:
      ValueError: there is none.
    """
    source = epath.Path(source).expanduser()
    if source.is_file():
        return source
    folders = sorted(source.glob("checkpoints*")) if source.exists() else []
    for folder in (*folders, source):
        if path := newest(folder):
            return path
    raise ValueError(
        f"no {NAMES} in {source} or a folder checkpoints* of it: --source is such a file, or the "
        "work directory that holds checkpoints/"
    )


def load(path: epath.PathLike) -> dict[str, Any]:
    """The nested dictionaries in the file ``path``.

    Raises:
      ValueError: it is no msgpack of flax, or holds something else.
    """
    path = epath.Path(path)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack has many ways to say that bytes are not its own.
        reason = str(error) or type(error).__name__
        message = f"{path} is not a flax msgpack file ({reason}): is the copy whole?"
        raise ValueError(message) from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds a {type(tree).__name__}, no training state")
    return tree


def flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return flatten_dict(dict(tree))


def unwrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the level "params" that some of their trees have, leaves as NumPy arrays."""
    inner = tree["params"] if set(tree) == {"params"} else tree
    return unflatten_dict({path: np.asarray(leaf) for path, leaf in flat(inner).items()})
