"""Reads checkpoint files of other code as plain data, without pickle, and writes them as ours.

    DIR/checkpoints*/checkpoint_N        written by Song et al.'s code
    DIR/checkpoints*/ckpt-N.flax         written by VDM's code

Each is one msgpack file of flax that holds a whole training state as nested dictionaries of arrays.
"""

import functools
import hashlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml.experiment import compatibility
from sbml.experiment.build import Experiment
from sbml.experiment.config import Config
from sbml.runtime import sharding
from sbml.runtime.checkpoint import Checkpoints
from sbml.runtime.state import TrainState
from sbml.runtime.trees import differences
from sbml.runtime.versions import versions
from sbml.types import Json, PyTree, Tree

_NUMBER = re.compile(r"(?:checkpoint_(\d+)|ckpt-(\d+)\.flax)")


class ForeignState(NamedTuple):
    """The training state in one checkpoint of other code.

    ``trees`` holds four nested dictionaries of arrays: the parameters ``params``, their average
    ``ema_params``, and Adam's running means after ``updates`` updates, ``mu`` of the gradient and
    ``nu`` of its square.
    """

    path: epath.Path
    step: int
    updates: int
    trees: dict[str, dict[str, PyTree]]

    @property
    def origin(self) -> dict[str, str | int]:
        """The file, its step and its SHA-256, to compare with the one that its publisher gives:
        msgpack files have no checksum, so reading does not notice a changed value."""
        with self.path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"file": str(self.path), "step": self.step, "sha256": sha256}

    @property
    def ema_params(self) -> dict[str, PyTree]:
        """The averaged parameters."""
        return self.trees["ema_params"]


def newest(folder: epath.PathLike) -> epath.Path | None:
    """The checkpoint with the largest N in ``folder``; None if there is none."""
    folder = epath.Path(folder).expanduser()
    matches = [(_NUMBER.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    numbered = {int(m[1] or m[2]): p for m, p in matches if m and p.is_file()}
    return numbered[max(numbered)] if numbered else None


def find(source: epath.PathLike) -> epath.Path:
    """The file ``source`` itself, or the newest checkpoint in the folder ``source`` or in a folder
    ``checkpoints*/`` of it."""
    source = epath.Path(source).expanduser()
    if source.is_file():
        return source
    folders = sorted(source.glob("checkpoints*")) if source.exists() else []
    for folder in (*folders, source):
        if path := newest(folder):
            return path
    raise ValueError(
        f"no checkpoint_N or ckpt-N.flax in {source} or in a folder checkpoints* of it: set "
        "--source to such a file, or to the work directory that holds checkpoints/"
    )


def unwrapped(tree: Tree) -> dict[str, PyTree]:
    """``tree`` with NumPy arrays as leaves and without the outer level "params" if it has one."""
    inner = tree["params"] if set(tree) == {"params"} else tree
    flat = flatten_dict(dict(inner))
    return unflatten_dict({path: np.asarray(leaf) for path, leaf in flat.items()})


def fit(
    config: Config, sections: compatibility.Sections, workdir: epath.Path
) -> tuple[Experiment, list[str]]:
    """The experiment of ``config`` with the fields of ``sections`` replaced, and a line for each
    change."""
    fitted, lines = compatibility.with_fields(config, sections)
    experiment = Experiment(fitted)
    if experiment.config.training.checkpoints(workdir).steps():
        raise ValueError(f"{workdir} has checkpoints already: convert into a new --workdir")
    return experiment, lines


def state(template: TrainState, theirs: ForeignState) -> TrainState:
    """``template`` with the arrays of the checkpoint ``theirs``, on the devices. The statistics of
    the training are 0, as before its first step."""
    for name, tree in theirs.trees.items():
        if mismatch := differences(tree, template.params):
            raise ValueError(f"{theirs.path}, {name}:\n  " + "\n  ".join(mismatch))
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), theirs.trees)
    for place, array in flatten_dict(arrays, sep="/").items():
        if wrong := array.size - int(jnp.isfinite(array).sum()):
            raise ValueError(
                f"{theirs.path}: {place} has {wrong} of {array.size} values that are NaN or "
                "infinite in float32: check that the file was copied whole, or take an earlier "
                "checkpoint"
            )
    count = jnp.asarray(theirs.updates, jnp.int32)
    converted = template.replace(
        step=jnp.asarray(theirs.step, jnp.int32),
        params=arrays["params"],
        ema_params=arrays["ema_params"],
        opt_state=optax.tree.set(template.opt_state, mu=arrays["mu"], nu=arrays["nu"], count=count),
        statistics=jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), template.statistics),
    )
    return jax.device_put(converted, sharding.replicated(sharding.data_mesh()))


def metadata(experiment: Experiment, score: ForeignState, dequantization: str) -> Json:
    """Metadata of the converted checkpoint: its config and origin. Its training data are not known,
    only how they were scaled (``dequantization``)."""
    config = experiment.config.plain()
    config["data"]["dequantization"] = dequantization
    return {"config": config, "data": None, "versions": versions(), "converted_from": score.origin}


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
