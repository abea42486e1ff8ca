"""Reads the checkpoints of Song et al.'s code (2021).

    DIR/checkpoints/checkpoint_N                       the score network
    DIR/flowpp_dequantizer/checkpoints/checkpoint_M    the Flow++ dequantizer, if it was trained

Each holds ``step``, ``optimizer/target`` (the parameters), ``optimizer/state`` (Adam's state),
``params_ema`` (the average of the parameters), and numbers that are not needed here.
"""

from collections.abc import Mapping
from typing import Any

from etils import epath
from flax.traverse_util import unflatten_dict

from sbml.convert._files import ForeignState, flat, load, unwrapped

SCORE = "checkpoints"
DEQUANTIZER = "flowpp_dequantizer/checkpoints"


def read(path: epath.Path, tree: Mapping[str, Any] | None = None) -> ForeignState:
    """The checkpoint in the file ``path``; ``tree`` is its content if it is already loaded.

    Raises:
      ValueError: it is not a checkpoint of their code; the message says what is missing.
    """
    tree = load(path) if tree is None else tree
    try:
        target, state = tree["optimizer"]["target"], tree["optimizer"]["state"]
        moments = flat(state["param_states"])
        trees = {
            "params": target,
            "ema_params": tree["params_ema"],
            "mu": _moment(moments, "grad_ema"),
            "nu": _moment(moments, "grad_sq_ema"),
        }
        trees = {name: unwrapped(tree) for name, tree in trees.items()}
        return ForeignState(path, int(tree["step"]), int(state["step"]), trees)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a training state of Song et al.'s code: no {error} in {sorted(tree)}; "
            "give a file checkpoint_N that their code wrote"
        ) from error


def _moment(moments: Mapping[tuple[str, ...], Any], name: str) -> dict[str, Any]:
    return unflatten_dict({path[:-1]: a for path, a in moments.items() if path[-1] == name})
