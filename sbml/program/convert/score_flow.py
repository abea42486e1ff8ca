"""Converts a work directory of Song et al.'s code: parameters, their average, optimizer state.

    DIR/checkpoints/checkpoint_N                       the score network
    DIR/flowpp_dequantizer/checkpoints/checkpoint_M    the Flow++ dequantizer, if it was trained

Each file holds ``step``, ``optimizer/target`` (the parameters), ``optimizer/state`` (Adam's state),
``params_ema`` (the average of the parameters), and numbers that are not needed here.

The architecture is read from the parameters as far as they determine it; the config gives the rest.
The new work directory stores the architecture, so the model can be evaluated, sampled or trained
further like any other.

Conventions of their networks:

    VP, sub-VP, linear VE   the network sees 999 t and predicts the noise
    VE                      it sees sigma, or log sigma in Fourier features, and predicts the score

All were trained on pixels scaled as k / 255. The checkpoint does not say which data set it was.
``dequantizers.variational`` renames the dequantizer's parameters.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml.core.types import Json, PyTree, Tree
from sbml.dequantizers import variational
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config
from sbml.program.config.fields import errors_of
from sbml.program.config.training import smallest_time
from sbml.program.convert import _files, _ncsnpp_options
from sbml.program.convert._files import ForeignState
from sbml.program.runtime import weights
from sbml.program.runtime.state import TrainState

NETWORK, KEY = "ncsnpp", "optimizer"
CODE = "Song et al.'s (optimizer, params_ema)"
DEQUANTIZER = "flowpp_dequantizer/checkpoints"


# Several heights with attention, or numbers of heads, can fit the same shapes of parameters.
UNTOLD = (
    "sde.name",
    "training.smallest_time",
    "score.parameterization",
    "training.likelihood_weighting",
    "training.importance_sampling",
    "data.flip",
    *(f"model.{name}" for name in ("nonlinearity", "skip_rescale", "fir", "fir_kernel")),
    "model.attn_resolutions",
)
# How their code computes a score from a network: the possible values of score.parameterization,
# score.label, and the embedding type of a network with Fourier features. The parameters do not show
# the parameterization: it is the config's if that is possible, else the first. "scaled_score" is
# for networks whose output their code divides by sigma (model.scale_by_sigma); none of their
# configs sets this.
_NOISE = ("noise",), "time", "fourier_linear"
_SCORE = ("score", "scaled_score"), "sigma", "fourier"
CONVENTIONS = {"vp": _NOISE, "subvp": _NOISE, "ve": _SCORE, "linear_ve": _NOISE}


def read(path: epath.Path, tree: Tree) -> ForeignState:
    """The checkpoint ``tree`` in the file ``path``."""
    return _files.read(path, tree, "Song et al.'s code", "checkpoint_N", _parts)


def _parts(tree: Tree) -> tuple[int, int, dict[str, dict[str, PyTree]]]:
    """The step, the number of updates, and the trees of a network."""
    target, adam = tree["optimizer"]["target"], tree["optimizer"]["state"]
    moments = flatten_dict(dict(adam["param_states"]))
    trees = {"params": target, "ema_params": tree["params_ema"]}
    for name, theirs in (("mu", "grad_ema"), ("nu", "grad_sq_ema")):
        trees[name] = unflatten_dict({p[:-1]: a for p, a in moments.items() if p[-1] == theirs})
    return tree["step"], adam["step"], {k: _files.unwrapped(v) for k, v in trees.items()}


def convert(config: Config, workdir: epath.Path, path: epath.Path, tree: Tree) -> list[str]:
    """Convert the checkpoint ``tree`` in the file ``path``, and that of the dequantizer if there is
    one, to ``workdir``."""
    score, flow, untold, remarks = read(path, tree), None, list(UNTOLD), []
    if flow_file := _files.newest(path.parent.parent / DEQUANTIZER):
        theirs = read(flow_file, weights.read(flow_file, "flax msgpack file"))
        trees = {name: variational.from_reference(part) for name, part in theirs.trees.items()}
        flow = dataclasses.replace(theirs, trees=trees)
    sections = _sections(config, score, flow)
    of_flow = None
    if flow is not None:
        shape = variational.image_shape(flow.ema_params)

        def template(experiment: Experiment) -> TrainState:
            model, images = experiment.dequantizer("variational"), jnp.zeros((2, *shape), jnp.uint8)
            params = model.init(jax.random.key(0), images)
            return TrainState.create(params, experiment.dequantizer_optimizer)

        of_flow = flow, template
        untold.append("dequantizer.model.heads")
        if shape != config.data.shape:
            remarks.append(f"{flow.path} fits only images of shape {shape}")
    return _files.store(config, workdir, sections, score, "none", untold, remarks, of_flow)


def _sections(config: Config, score: ForeignState, flow: ForeignState | None) -> dict[str, Json]:
    """The fields of the config, by section, that describe the checkpoints."""
    if config.sde.name not in CONVENTIONS:
        names = ", ".join(CONVENTIONS)
        raise ValueError(f"config.sde.name={config.sde.name!r}: their models have one of {names}")
    possible, label, fourier = CONVENTIONS[config.sde.name]
    choice = config.score.parameterization
    # Their models were not trained on bin centres.
    eps = smallest_time(config.sde.build(), config.training, config.data, math.inf)
    height, channels = config.data.shape[0], config.data.shape[-1]
    with errors_of(score.path):
        options = _ncsnpp_options.read_options(score.ema_params, config.model.own, height, channels)
    _files.check_channels(score, np.shape(score.ema_params["Conv_0"]["kernel"])[2], config)
    if options["embedding_type"] != "positional":
        options["embedding_type"] = fourier
    sections: dict[str, Json] = {
        "model": {"name": NETWORK, **options},
        "score": {
            "parameterization": choice if choice in possible else possible[0],
            "label": label,
        },
        "sde": dict(config.sde.replace(learned=False)),
        "training": {"smallest_time": eps},
    }
    if flow is not None:
        sections["dequantizer.model"] = variational.read_options(
            flow.ema_params, dict(config.dequantizer.model)
        )
    return sections
