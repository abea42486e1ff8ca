"""A work directory of Song et al.'s code becomes one of ours: parameters, averages, optimizer.

Everything that the parameters tell of the architecture is read from them, the rest is the config's;
the work directory then carries the architecture, and is evaluated, sampled or trained on like any.

Their conventions: the network sees 999 t and predicts the noise (VP, sub-VP, linear VE), or sees
sigma, or its logarithm in Fourier features, and predicts the score (VE); it was trained on k / 255,
and without knowledge of ours about its data. The dequantizer's parameters are renamed by
``dequantizers.variational``.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sbml.convert import _ncsnpp_options, _writing
from sbml.convert import _score_flow_file as authors
from sbml.convert._files import ForeignState, newest
from sbml.dequantizers import variational
from sbml.experiment import architecture
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.experiment.noise import smallest_time
from sbml.runtime import sharding
from sbml.runtime.checkpoint import tree_crc32
from sbml.runtime.state import TrainState

NETWORK = "ncsnpp"
CODE = "Song et al.'s (optimizer, params_ema)"


class Convention(NamedTuple):
    """How a score was made of their networks.

    Attributes:
      parameterizations: of ``config.score``. Of several the parameters do not tell which: it is
        the config's if that is among them, else the first.
      label: of ``config.score``.
      fourier: the embedding, where it is one by Fourier features.
    """

    parameterizations: tuple[str, ...]
    label: str
    fourier: str


_NOISE = Convention(("noise",), "time", "fourier_linear")
# The network divides by sigma itself where model.scale_by_sigma is set, in no config of theirs.
_SCORE = Convention(("unscaled", "score"), "sigma", "fourier")
CONVENTIONS = {"vp": _NOISE, "subvp": _NOISE, "ve": _SCORE, "linear_ve": _NOISE}


def recognises(tree: Mapping[str, Any]) -> bool:
    """Whether a file of this content is theirs."""
    return "optimizer" in tree


def convert(
    config: ConfigDict, workdir: epath.Path, path: epath.Path, tree: Mapping[str, Any]
) -> None:
    """Convert the checkpoint ``tree`` in the file ``path``, and the dequantizer's, to ``workdir``.

    Raises:
      ValueError: a checkpoint that is no network of ours (its missing, extra or misshapen leaves
        are named), or a ``workdir`` that has checkpoints already.
    """
    score = authors.read(path, tree)
    flow_file = newest(path.parent.parent / authors.DEQUANTIZER)
    flow = None if flow_file is None else _renamed(authors.read(flow_file))
    sections = _sections(config, score, flow)
    experiment, lines = _writing.fit(config, sections, workdir)
    # All is checked before anything is written: half a conversion could not be made whole.
    score_state = _writing.score_state(experiment, score)
    flow_state = None if flow is None else _flow_state(experiment, flow)
    metadata = _writing.metadata(experiment, score, "none")
    if jax.process_index() == 0:
        architecture.write(workdir, sections)
    with experiment.config.training.checkpoints(workdir) as checkpoints:
        checkpoints.save(score.step, score_state, metadata)
        written = [_writing.line(score, checkpoints)]
    if flow is not None:
        against = {"step": score.step, "crc32": tree_crc32(score.ema_params)}
        with experiment.config.dequantizer.training.checkpoints(workdir) as checkpoints:
            checkpoints.save(flow.step, flow_state, {**metadata, "score": against})
            written.append(_writing.line(flow, checkpoints))
        if (shape := variational.image_shape(flow.ema_params)) != experiment.config.data.shape:
            written.append(f"{flow.path} is for images of {shape} alone")
    fields = ["sde.name", "training.smallest_time", "score.parameterization"]
    fields += ["training.likelihood_weighting", "training.importance_sampling", "data.flip"]
    fields += [f"model.{name}" for name in ("nonlinearity", "skip_rescale", "fir", "fir_kernel")]
    print("\n".join([*lines, _writing.untold(experiment.config, fields), *written]))


def _renamed(theirs: ForeignState) -> ForeignState:
    """A dequantizer's state with its trees under our names and in our layout."""
    renamed = {name: variational.from_reference(tree) for name, tree in theirs.trees.items()}
    return theirs._replace(trees=renamed)


def _sections(
    config: ConfigDict, score: ForeignState, flow: ForeignState | None
) -> architecture.Sections:
    """The sections of a config that fit the checkpoints."""
    if config.sde.name not in CONVENTIONS:
        names = ", ".join(CONVENTIONS)
        raise ValueError(f"config.sde.name={config.sde.name!r}: their models have one of {names}")
    ours = Config.read(config)
    # Theirs were never trained on bin centres.
    eps = smallest_time(ours.sde.build(), ours.training, ours.data, math.inf)
    convention = CONVENTIONS[config.sde.name]
    given = {k: v for k, v in config.model.items() if k != "name"}
    height, channels = config.data.shape[0], config.data.shape[-1]
    try:
        options = _ncsnpp_options.read_options(score.ema_params, given, height, channels)
    except ValueError as error:
        raise ValueError(f"{score.path}: {error}") from error
    found = np.shape(score.ema_params["Conv_0"]["kernel"])[2]
    if found != channels:
        raise ValueError(
            f"{score.path} is of images with {found} channels, "
            f"config.data.shape={config.data.shape}"
        )
    if options["embedding_type"] != "positional":
        options["embedding_type"] = convention.fourier
    asked, known = config.score.parameterization, convention.parameterizations
    scored = {
        "parameterization": asked if asked in known else known[0],
        "label": convention.label,
    }
    sections = {
        "model": {"name": "ncsnpp", **options},
        "score": scored,
        "sde": dict(config.sde),
        "training": {"smallest_time": eps},
    }
    if flow is not None:
        sections["dequantizer.model"] = variational.read_options(
            flow.ema_params, config.dequantizer.model.to_dict()
        )
    return sections


def _flow_state(experiment: Experiment, theirs: ForeignState) -> TrainState:
    shape = variational.image_shape(theirs.ema_params)
    model = experiment.dequantizer("variational")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((2, *shape), jnp.uint8))
    template = jax.eval_shape(
        lambda p: TrainState.create(p, experiment.dequantizer_optimizer), params
    )
    return jax.device_put(
        _writing.state(template, theirs), sharding.replicated(sharding.data_mesh())
    )
