"""Numbers of the original JAX code of Song et al. for a small DDPM++, to compare with.

The weights are an initialisation plus Gaussian noise: they are useless as a model, but they are a
strict check. ``score_flow_vp_small.msgpack.gz`` is a checkpoint in that code's format. In it, the
parameters and Adam's state are zeros, which take no space when compressed; the weights are the
average of the parameters.
"""

import gzip
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import serialization

DATA = Path(__file__).parent / "data"
OPTIONS = {"nf": 16, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (8,)}


class Reference(NamedTuple):
    """``network`` is the network's output for ``x`` with label 999 t and no dropout; score =
    -network / std(t).

    The SDE is VP with beta from 0.1 to 20. From ``image`` their ODE at tolerances 1e-6 starts at
    ``ode_eps`` and ends in ``ode_z``. Rows of the bits/dim are independent draws, columns images.
    """

    params: dict[str, Any]
    x: np.ndarray  # (4, 16, 16, 3)
    t: np.ndarray  # (4,)
    network: np.ndarray  # (4, 16, 16, 3)
    score: np.ndarray  # (4, 16, 16, 3)
    image: np.ndarray  # (4, 16, 16, 3) in [-1, 1]
    ode_eps: np.ndarray  # ()
    ode_z: np.ndarray  # (4, 16, 16, 3)
    ode_bpd: np.ndarray  # (8, 4)
    bound_bpd: np.ndarray  # (8, 4)


def checkpoint() -> dict[str, Any]:
    """The checkpoint's tree, with their names."""
    packed = (DATA / "score_flow_vp_small.msgpack.gz").read_bytes()
    return serialization.msgpack_restore(gzip.decompress(packed))


def load() -> Reference:
    """The reference, with its parameters nested as those of ``ncsnpp`` with ``OPTIONS``."""
    with np.load(DATA / "score_flow_vp_small.npz") as file:
        return Reference(params=checkpoint()["params_ema"], **{name: file[name] for name in file})
