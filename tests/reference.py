"""Numbers of the original JAX code of Song et al. for a small DDPM++, to compare with.

The weights are an initialisation plus Gaussian noise: meaningless as a model, sharp as a check.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict

FILE = Path(__file__).parent / "data" / "score_flow_vp_small.npz"
OPTIONS = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}


class Reference(NamedTuple):
    """``network`` is that of ``x`` with label 999 t and no dropout; score = -network / std(t).

    The SDE is VP with beta from 0.1 to 20.
    """

    params: dict[str, Any]
    x: np.ndarray  # (4, 16, 16, 3)
    t: np.ndarray  # (4,)
    network: np.ndarray  # (4, 16, 16, 3)
    score: np.ndarray  # (4, 16, 16, 3)


def load() -> Reference:
    """The reference, its parameters nested as the network ``ncsnpp`` with ``OPTIONS`` has them."""
    with np.load(FILE) as file:
        arrays = {name: file[name] for name in file}
    params = {k.removeprefix("params/"): v for k, v in arrays.items() if k.startswith("params/")}
    rest = {k: v for k, v in arrays.items() if not k.startswith("params/")}
    return Reference(params=unflatten_dict(params, sep="/"), **rest)
