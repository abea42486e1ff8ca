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

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml.convert import _files, _ncsnpp_options
from sbml.convert._files import ForeignState
from sbml.dequantizers import variational
from sbml.experiment import compatibility
from sbml.experiment.config import Config
from sbml.experiment.training import smallest_time
from sbml.runtime import weights
from sbml.runtime.state import TrainState
from sbml.runtime.trees import tree_crc32
from sbml.types import Tree

NETWORK = "ncsnpp"
CODE = "Song et al.'s (optimizer, params_ema)"
SCORE = "checkpoints"
DEQUANTIZER = "flowpp_dequantizer/checkpoints"


class Convention(NamedTuple):
    """How their code computes a score from a network.

    Attributes:
      parameterizations: possible values of ``config.score.parameterization``. The parameters do not
        show which one it is: it is the config's value if that is among them, else the first.
      label: the value of ``config.score.label``.
      fourier: the embedding type of a network that embeds the label by Fourier features.
    """

    parameterizations: tuple[str, ...]
    label: str
    fourier: str


_NOISE = Convention(("noise",), "time", "fourier_linear")
# "scaled_score" is for networks whose output their code divides by sigma (model.scale_by_sigma).
# None of their configs sets this.
_SCORE = Convention(("score", "scaled_score"), "sigma", "fourier")
CONVENTIONS = {"vp": _NOISE, "subvp": _NOISE, "ve": _SCORE, "linear_ve": _NOISE}


def recognises(tree: Tree) -> bool:
    """Whether a file with the content ``tree`` was written by their code."""
    return "optimizer" in tree


def read(path: epath.Path, tree: Tree) -> ForeignState:
    """The checkpoint ``tree`` in the file ``path``."""
    try:
        target, state = tree["optimizer"]["target"], tree["optimizer"]["state"]
        moments = flatten_dict(dict(state["param_states"]))
        trees = {"params": target, "ema_params": tree["params_ema"]}
        for name, theirs in (("mu", "grad_ema"), ("nu", "grad_sq_ema")):
            trees[name] = unflatten_dict({p[:-1]: a for p, a in moments.items() if p[-1] == theirs})
        trees = {name: _files.unwrapped(tree) for name, tree in trees.items()}
        return ForeignState(path, int(tree["step"]), int(state["step"]), trees)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a training state of Song et al.'s code: no {error} in {sorted(tree)}; "
            "give a file checkpoint_N that their code wrote"
        ) from error


def convert(config: Config, workdir: epath.Path, path: epath.Path, tree: Tree) -> None:
    """Convert the checkpoint ``tree`` in the file ``path``, and that of the dequantizer if there is
    one, to ``workdir``."""
    score, flow = read(path, tree), None
    if flow_file := _files.newest(path.parent.parent / DEQUANTIZER):
        flow = read(flow_file, weights.read(flow_file, "flax msgpack file"))
        renamed = {name: variational.from_reference(part) for name, part in flow.trees.items()}
        flow = flow._replace(trees=renamed)
    sections = _sections(config, score, flow)
    experiment, lines = _files.fit(config, sections, workdir)
    # Everything is checked before anything is written, so that no half conversion is left behind.
    score_state = _files.state(jax.eval_shape(experiment.init_state), score)
    if flow is not None:
        shape = variational.image_shape(flow.ema_params)
        images, key = jnp.zeros((2, *shape), jnp.uint8), jax.random.key(0)
        model, optimizer = experiment.dequantizer("variational"), experiment.dequantizer_optimizer
        template = jax.eval_shape(
            lambda key: TrainState.create(model.init(key, images), optimizer), key
        )
        flow_state = _files.state(template, flow)
    metadata = _files.metadata(experiment, score, "none")
    if jax.process_index() == 0:
        compatibility.write_architecture(workdir, sections)
    with experiment.config.training.checkpoints(workdir) as checkpoints:
        checkpoints.save(score.step, score_state, metadata)
        written = [_files.line(score, checkpoints)]
    if flow is not None:
        trained_for = {"step": score.step, "crc32": tree_crc32(score.ema_params)}
        of_flow = {"score": trained_for, "converted_from": flow.origin}
        with experiment.config.dequantizer.training.checkpoints(workdir) as checkpoints:
            checkpoints.save(flow.step, flow_state, {**metadata, **of_flow})
            written.append(_files.line(flow, checkpoints))
        if shape != experiment.config.data.shape:
            written.append(f"{flow.path} fits only images of shape {shape}")
    fields = ["sde.name", "training.smallest_time", "score.parameterization"]
    fields += ["training.likelihood_weighting", "training.importance_sampling", "data.flip"]
    fields += [f"model.{name}" for name in ("nonlinearity", "skip_rescale", "fir", "fir_kernel")]
    # Several heights, or numbers of heads, can fit the same shapes of parameters.
    fields += ["model.attn_resolutions", *(["dequantizer.model.heads"] if flow else [])]
    print("\n".join([*lines, _files.untold(experiment.config, fields), *written]))


def _sections(
    config: Config, score: ForeignState, flow: ForeignState | None
) -> compatibility.Sections:
    """The fields of the config, by section, that describe the checkpoints."""
    if config.sde.name not in CONVENTIONS:
        names = ", ".join(CONVENTIONS)
        raise ValueError(f"config.sde.name={config.sde.name!r}: their models have one of {names}")
    # Their models were not trained on bin centres.
    eps = smallest_time(config.sde.build(), config.training, config.data, math.inf)
    convention = CONVENTIONS[config.sde.name]
    height, channels = config.data.shape[0], config.data.shape[-1]
    try:
        options = _ncsnpp_options.read_options(score.ema_params, config.model.own, height, channels)
    except ValueError as error:
        raise ValueError(f"{score.path}: {error}") from error
    inputs = np.shape(score.ema_params["Conv_0"]["kernel"])[2]
    if inputs != channels:
        raise ValueError(
            f"{score.path} is for images with {inputs} channels, but config.data.shape is "
            f"{config.data.shape}: take a config of that data"
        )
    if options["embedding_type"] != "positional":
        options["embedding_type"] = convention.fourier
    choice, possible = config.score.parameterization, convention.parameterizations
    sections = {
        "model": {"name": "ncsnpp", **options},
        "score": {
            "parameterization": choice if choice in possible else possible[0],
            "label": convention.label,
        },
        "sde": dict(config.sde.replace(learned=False)),
        "training": {"smallest_time": eps},
    }
    if flow is not None:
        sections["dequantizer.model"] = variational.read_options(
            flow.ema_params, dict(config.dequantizer.model)
        )
    return sections
