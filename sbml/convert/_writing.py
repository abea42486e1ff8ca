"""Steps of every conversion: adapt the config, build the state, and record its origin."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from etils import epath

from sbml.convert._files import ForeignState
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.runtime import sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.state import TrainState
from sbml.runtime.trees import differences
from sbml.runtime.versions import versions


def fit(
    config: Config, sections: trained.Sections, workdir: epath.Path
) -> tuple[Experiment, list[str]]:
    """The experiment of ``config`` with the fields of ``sections`` replaced, and a line for each
    change.

    Raises:
      ValueError: ``workdir`` has checkpoints already.
    """
    fitted, lines = trained.with_fields(config, sections)
    experiment = Experiment(fitted)
    if experiment.config.training.checkpoints(workdir).steps():
        raise ValueError(f"{workdir} has checkpoints already: convert into a new --workdir")
    return experiment, lines


def state(template: TrainState, theirs: ForeignState) -> TrainState:
    """``template`` with its arrays replaced by those of the checkpoint ``theirs``.

    Raises:
      ValueError: the trees do not fit; the message lists the leaves that are missing, extra or
        misshapen.
    """
    for name, tree in theirs.trees.items():
        if mismatch := differences(tree, template.params):
            raise ValueError(f"{theirs.path}, {name}:\n  " + "\n  ".join(mismatch))
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theirs.trees)
    count = jnp.asarray(theirs.updates, jnp.int32)
    return template.replace(
        step=jnp.asarray(theirs.step, jnp.int32),
        params=arrays["params"],
        ema_params=arrays["ema_params"],
        opt_state=optax.tree.set(template.opt_state, mu=arrays["mu"], nu=arrays["nu"], count=count),
    )


def score_state(experiment: Experiment, theirs: ForeignState) -> TrainState:
    """The state of the score network, on the devices; its statistics are those before training."""
    template = jax.eval_shape(experiment.init_state)  # All its parameters are replaced.
    converted = state(template, theirs)
    statistics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), template.statistics)
    where = sharding.replicated(sharding.data_mesh())
    return jax.device_put(converted.replace(statistics=statistics), where)


def metadata(experiment: Experiment, score: ForeignState, dequantization: str) -> dict[str, Any]:
    """Metadata of the converted checkpoint: its config and origin. Its training data are not known,
    only how they were scaled (``dequantization``)."""
    config = experiment.to_plain()
    config["data"]["dequantization"] = dequantization
    origin = {"converted_from": score.origin}
    return {"config": config, "data": None, "versions": versions(), **origin}


def untold(config: Config, fields: list[str]) -> str:
    """The line that lists the ``fields`` which the checkpoint does not determine, with the values
    that ``--config`` gives them."""
    plain = config.plain()
    values = (
        f"{name}={functools.reduce(lambda node, part: node[part], name.split('.'), plain)}"
        for name in fields
    )
    return f"not stored in the checkpoint, therefore taken from --config: {', '.join(values)}"


def line(theirs: ForeignState, checkpoints: Checkpoints) -> str:
    """The line that names the file, its SHA-256, step, size and the folder it was written to."""
    count = sum(leaf.size for leaf in jax.tree.leaves(theirs.ema_params))
    sha256, where = theirs.origin["sha256"], checkpoints.directory
    return f"{theirs.path} (sha256 {sha256}): step {theirs.step}, {count:,} parameters -> {where}"
