"""Converts a checkpoint of the code of "Variational Diffusion Models".

The file holds ``step``, ``params``, ``ema_params`` and ``opt_state`` (of AdamW). The parameters are
``score_model``, the network, and ``gamma``, the noise schedule, which is absent if the schedule is
fixed. The options of the network and the schedule are read from the parameters. The range of log
SNR that scales the time label is not among them: it is two constants of their config, here
``config.score.log_snr_range``, whose default is the range of all published configs.

The values of a learned schedule at t = 0 and t = 1 are kept, and gamma becomes linear between them:
in continuous time no bound, likelihood or sample depends on more (``sbml.sdes.vdm``). If training
continues, the schedule is not learned further. A class-conditional model is evaluated with class 0.

Conventions of their models: the network predicts the noise minus its input, pixels are represented
by the centres of their bins, and the decoder is at time 0.
"""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sbml import networks
from sbml.core.types import Json, PyTree, Tree
from sbml.networks.vdm import GROUPS
from sbml.program.config.config import Config
from sbml.program.convert import _files
from sbml.program.convert._files import ForeignState, unwrapped
from sbml.sdes import LinearGamma, MonotoneGamma

NETWORK, KEY = "vdm", "opt_state"
CODE = "VDM's (opt_state, ema_params)"
FOURIER = networks.frequencies(256)  # Their networks use these for every number of levels.


def convert(config: Config, workdir: epath.Path, path: epath.Path, tree: Tree) -> list[str]:
    """Convert the checkpoint ``tree`` in the file ``path`` to ``workdir``."""
    score = _files.read(path, tree, "VDM's code", "ckpt-N.flax", _parts)
    least, largest = config.score.log_snr_range
    gamma_0, gamma_1 = -largest, -least  # A fixed schedule spans the range of the time label.
    if gamma := unwrapped(tree["ema_params"]).get("gamma"):
        with jax.enable_x64(True):
            exact = jax.tree.map(lambda a: jnp.asarray(a, float), gamma)
            gamma_0, gamma_1 = schedule(exact).gamma(jnp.asarray([0.0, 1.0])).tolist()
    sections = {
        "model": {"name": NETWORK, **network_fields(score, config)},
        "score": {
            "parameterization": "residual",
            "label": "scaled_log_snr",
            "log_snr_range": config.score.log_snr_range,
        },
        "sde": {"name": "linear_gamma", "learned": False, "gamma_0": gamma_0, "gamma_1": gamma_1},
        "training": {"smallest_time": LinearGamma.smallest_time},
    }
    untold = "score.log_snr_range", "data.flip"
    return _files.store(config, workdir, sections, score, "centre", untold=untold)


def _parts(tree: Tree) -> tuple[int, int, dict[str, dict[str, PyTree]]]:
    """The step, the number of updates, and the trees of the network."""
    adam = tree["opt_state"]["0"]
    trees = {name: tree[name] for name in ("params", "ema_params")}
    trees |= {name: adam[name] for name in ("mu", "nu")}
    network = {name: unwrapped(each)["score_model"] for name, each in trees.items()}
    return tree["step"], adam["count"], network


def network_fields(score: ForeignState, config: Config) -> Json:
    """The fields of the network, read from the shapes of its parameters."""
    params = score.ema_params
    try:
        inputs, width = np.shape(params["conv_in"]["kernel"])[2:]
        outputs = np.shape(params["conv_out"]["kernel"])[-1]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{score.path} does not hold a network of VDM: conv_in/kernel or conv_out/kernel is "
            f"missing or misshapen in {sorted(params)}"
        ) from error
    _files.check_channels(score, outputs, config)
    fourier = {outputs: (), outputs * (1 + 2 * len(FOURIER)): FOURIER}
    if inputs not in fourier:
        raise ValueError(
            f"{score.path}: conv_in reads {inputs} channels for images with {outputs}, but VDM's "
            f"networks read {' or '.join(map(str, fourier))}"
        )
    return {
        "width": width,
        "depth": sum(name.startswith("down.block_") for name in params),
        "attention": "up.attn_0" in params,
        "groups": GROUPS,
        "fourier": fourier[inputs],
    }


def schedule(gamma: Tree) -> LinearGamma | MonotoneGamma:
    """The learned schedule with parameters ``gamma``, differentiable in them."""
    if set(gamma) == {"w", "b"}:
        w, b = gamma["w"][0], gamma["b"][0]
        return LinearGamma(b, b + jnp.abs(w))
    if set(gamma) == {"l1", "l2", "l3"}:
        l1, l2, l3 = gamma["l1"], gamma["l2"], gamma["l3"]
        units = l2["kernel"][0], l2["bias"], l3["kernel"][:, 0]
        return MonotoneGamma(l1["kernel"][0, 0], l1["bias"][0], *units)
    raise ValueError(f"gamma has {sorted(gamma)}: VDM's schedules have w, b or l1, l2, l3")
