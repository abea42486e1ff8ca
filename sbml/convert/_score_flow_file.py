"""The checkpoints of Song et al. (2021), read as plain data: nothing is unpickled.

    DIR/checkpoints/checkpoint_N                       the score network
    DIR/flowpp_dequantizer/checkpoints/checkpoint_M    the Flow++ dequantizer, if it was trained

Each is one msgpack file of flax: ``step``, ``optimizer/target`` (the parameters),
``optimizer/state`` (of Adam), ``params_ema`` (their average), and numbers not needed here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

SCORE = "checkpoints"
DEQUANTIZER = "flowpp_dequantizer/checkpoints"
PREFIX = "checkpoint_"


class AuthorsState(NamedTuple):
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
    found = list(folder.glob(f"{PREFIX}*")) if folder.exists() else []
    numbered = {int(p.name[len(PREFIX) :]): p for p in found if p.name[len(PREFIX) :].isdecimal()}
    return numbered[max(numbered)] if numbered else None


def read(path: epath.PathLike) -> AuthorsState:
    """The checkpoint in the file ``path``.

    Raises:
      ValueError: it is no msgpack of theirs; the message says what it is or lacks.
    """
    path = epath.Path(path)
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
    except Exception as error:  # msgpack has many ways to say that bytes are not its own.
        message = f"{path} is not a flax msgpack file ({error}): is the copy whole?"
        raise ValueError(message) from error
    try:
        target, state = tree["optimizer"]["target"], tree["optimizer"]["state"]
        moments = _flat(state["param_states"])
        trees = {
            "params": target,
            "ema_params": tree["params_ema"],
            "mu": _moment(moments, "grad_ema"),
            "nu": _moment(moments, "grad_sq_ema"),
        }
        trees = {name: _unwrapped(tree) for name, tree in trees.items()}
        return AuthorsState(path, int(tree["step"]), int(state["step"]), trees)
    except (KeyError, TypeError, AttributeError) as error:
        found = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
        raise ValueError(
            f"{path} is not a training state of Song et al.'s code: no {error} in {found}"
        ) from error


def _flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return flatten_dict(dict(tree))


def _moment(moments: Mapping[tuple[str, ...], Any], name: str) -> dict[str, Any]:
    return unflatten_dict({path[:-1]: a for path, a in moments.items() if path[-1] == name})


def _unwrapped(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Without the level "params" that some of their trees have, leaves as NumPy arrays."""
    inner = tree["params"] if set(tree) == {"params"} else tree
    return unflatten_dict({path: np.asarray(leaf) for path, leaf in _flat(inner).items()})
