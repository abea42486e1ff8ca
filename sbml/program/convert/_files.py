"""Reads checkpoint files of other code as plain data, without pickle, and writes them as ours.

    DIR/checkpoints*/checkpoint_N        written by Song et al.'s code
    DIR/checkpoints*/ckpt-N.flax         written by VDM's code

Each is one msgpack file of flax that holds a whole training state as nested dictionaries of arrays.
"""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from sbml.core.types import Json, PyTree, Tree
from sbml.program.config import compatibility
from sbml.program.config.build import Experiment
from sbml.program.config.config import Config
from sbml.program.config.training import Loop
from sbml.program.runtime import sharding
from sbml.program.runtime.state import TrainState
from sbml.program.runtime.trees import differences, tree_crc32
from sbml.program.runtime.versions import versions
from sbml.program.runtime.workdir import ARCHITECTURE, Workdir

_NUMBER = re.compile(r"(?:checkpoint_(\d+)|ckpt-(\d+)\.flax)")


@dataclasses.dataclass(frozen=True)
class ForeignState:
    """The training state in one checkpoint of other code.

    ``trees`` holds four nested dictionaries of arrays: the parameters ``params``, their average
    ``ema_params``, and Adam's running means after ``updates`` updates, ``mu`` of the gradient and
    ``nu`` of its square.
    """

    path: epath.Path
    step: int
    updates: int
    trees: dict[str, dict[str, PyTree]]

    @functools.cached_property
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


Parts = Callable[[Tree], tuple[int, int, dict[str, dict[str, PyTree]]]]


def read(path: epath.Path, tree: Tree, code: str, name: str, parts: Parts) -> ForeignState:
    """The checkpoint ``tree`` in the file ``path``, of which ``parts`` gives the step, the number
    of updates and the trees. ``code`` names the code in an error, and ``name`` its files."""
    try:
        step, updates, trees = parts(tree)
        return ForeignState(path, int(step), int(updates), trees)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a training state of {code}: no {error} in {sorted(tree)}; give a file "
            f"{name} that their code wrote"
        ) from error


def check_channels(theirs: ForeignState, channels: int, config: Config) -> None:
    """Check that images of ``config`` have the ``channels`` of the network of ``theirs``."""
    if channels != config.data.shape[-1]:
        raise ValueError(
            f"{theirs.path} is for images with {channels} channels, but config.data.shape is "
            f"{config.data.shape}: take a config of that data"
        )


def store(
    config: Config,
    workdir: epath.Path,
    sections: compatibility.Sections,
    theirs: ForeignState,
    dequantization: str,
    untold: Sequence[str] = (),
    remarks: Sequence[str] = (),
    flow: tuple[ForeignState, Callable[[Experiment], TrainState]] | None = None,
) -> list[str]:
    """Write the score ``theirs`` to ``workdir``; returns lines that say what was converted.

    Args:
      config: its fields in ``sections`` are replaced by these.
      dequantization: how the training data were scaled; nothing else is known of them.
      untold: fields that the checkpoint does not determine.
      remarks: further lines.
      flow: a dequantizer for this score, and a function that makes its state.
    """
    fitted, lines = compatibility.with_fields(config, sections)
    if fitted.training.checkpoints(workdir).steps():
        raise ValueError(f"{workdir} has checkpoints already: convert into a new --workdir")
    if fitted.optim.name != "adam":
        raise ValueError(f"optim.name={fitted.optim.name}: the checkpoint is of Adam; give adam")
    experiment, plain = Experiment(fitted), fitted.plain()
    fields = flatten_dict(plain, sep=".")
    if untold:
        said = ", ".join(f"{name}={fields[name]}" for name in untold)
        lines.append(f"not stored in the checkpoint, therefore taken from --config: {said}")
    plain["data"]["dequantization"] = dequantization
    about = {"config": plain, "smallest_time": experiment.eps, "data": None, "versions": versions()}
    # Everything is checked before anything is written, so that no half conversion is left behind.
    state = _state(jax.eval_shape(experiment.init_state), theirs)
    parts: list[tuple[Loop, ForeignState, TrainState, Json]]
    parts = [(fitted.training, theirs, state, about)]
    if flow is not None:
        other, template = flow
        about = about | {"score": {"step": theirs.step, "crc32": tree_crc32(theirs.ema_params)}}
        state = _state(jax.eval_shape(lambda: template(experiment)), other)
        parts.append((fitted.dequantizer.training, other, state, about))
    fixed = {
        name: {field: value for field, value in fields.items() if field not in compatibility.FREE}
        for name, fields in sections.items()
    }
    Workdir(workdir).write(ARCHITECTURE, fixed)
    for training, part, state, of_part in parts:
        with training.checkpoints(workdir) as ours:
            ours.save(part.step, state, of_part | {"converted_from": part.origin})
        lines.append(
            f"{part.path} (sha256 {part.origin['sha256']}): step {part.step}, "
            f"{sum(leaf.size for leaf in jax.tree.leaves(part.ema_params)):,} parameters -> "
            f"{ours.directory}"
        )
    return [*lines, *remarks]


def _state(template: TrainState, theirs: ForeignState) -> TrainState:
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
