"""Compares the config and data that are stored in a checkpoint with those of the present run.

With another SDE or nonlinearity the parameters of a checkpoint would give wrong results, although
their shapes fit. A converted checkpoint may fit none of the configs in this package. So its work
directory has a file ``architecture.json`` with the fields that fit it. They replace the fields of
the config (:func:`of_workdir`).
"""

import functools
import math

from flax.traverse_util import flatten_dict, unflatten_dict

from sbml import data
from sbml.core import registry
from sbml.core.door import brief
from sbml.core.scalars import notation
from sbml.core.types import Json
from sbml.program.config.config import Config, parts_in
from sbml.program.config.fields import plain
from sbml.program.config.training import smallest_time, smallest_trained_time
from sbml.program.runtime.checkpoint import OtherModelError
from sbml.program.runtime.workdir import ARCHITECTURE, Workdir
from sbml.score import LEVELS
from sbml.sdes import SDE

Metadata = Json
Sections = dict[str, Json]

# Fields of a network or dequantizer that may differ from those in the checkpoint's config.
FREE = ("clipped", "dropout", "dtype", "init_scale", "remat")
# Fields and a part of a fingerprint that do not tell why two sets of images differ.
SAME_DATA = ("data.cache_dir", "data.dequantization", "data.flip", "data.manual_dir", "id")
_said = functools.partial(brief, form=notation)  # a value of a field in a message


def of_workdir(config: Config, workdir: Workdir, quiet: bool = False) -> Config:
    """``config`` with the fields of ``architecture.json`` in ``workdir``, if there is such a file.
    Each changed field is printed, unless ``quiet``."""
    if not workdir.has(ARCHITECTURE):
        return config
    stored = workdir.read(ARCHITECTURE)
    with registry.only(parts_in(config.plain()) - parts_in(stored)):
        changed, lines = with_fields(config, stored)
    for line in () if quiet else lines:
        print(f"{workdir / ARCHITECTURE}: {line}")
    return changed


def with_fields(config: Config, sections: Sections) -> tuple[Config, list[str]]:
    """``config`` with the fields in ``sections`` replaced, and a line for each change.

    If a section names another class than ``config``, such as another network, all of its fields are
    replaced.
    """
    before = flatten_dict(config.plain(), sep=".")
    now = dict(before)
    for section, fields in sections.items():
        name = before.get(f"{section}.name")
        if fields.get("name", name) != name:
            now = {k: value for k, value in now.items() if not k.startswith(f"{section}.")}
        now |= {f"{section}.{field}": plain(value) for field, value in fields.items()}
    lines = [
        f"config.{name}={_said(value)}, as in the checkpoint, replaces {_said(before[name])}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    return Config(**unflatten_dict(now, sep=".")), lines


# The name of a field, its value here, and its value in the checkpoint.
Difference = tuple[str, object, object]


def _differences(config: Config, metadata: Metadata, *names: str) -> list[Difference]:
    """The fields whose values differ between ``config`` and a checkpoint.

    Only the fields and sections with one of ``names`` are compared.

    A field that only one of the two configs has comes from another version of the package and is
    ignored, as are the fields in ``FREE``.
    """
    ours, theirs = (flatten_dict(c, sep=".") for c in (config.plain(), metadata["config"]))
    prefixes = tuple(f"{name}." for name in names)
    return [
        (name, ours[name], plain(value))
        for name, value in theirs.items()
        if f"{name}.".startswith(prefixes)
        and name in ours
        and name.rpartition(".")[2] not in FREE
        and ours[name] != plain(value)
    ]


def _refuse(different: list[Difference], otherwise: str = "") -> None:
    """Raise an error if there are differences; ``otherwise`` says what else the user can do."""
    if different:
        texts = [(name, _said(ours), _said(theirs)) for name, ours, theirs in different]
        said = [f"config.{name} is {a}, the checkpoint's is {b}" for name, a, b in texts]
        flags = " ".join(f"--config.{name}={theirs}" for name, _, theirs in texts)
        remedy = "" if "..." in flags else f", or set {flags}"  # A brief value is not whole.
        raise OtherModelError(
            f"the checkpoint is of another model: {'; '.join(said)}. Use the --config of its "
            f"training{remedy}{otherwise}"
        )


def check_score(config: Config, metadata: Metadata) -> None:
    """Check that the parameters of a checkpoint give the same score with ``config``.

    This is checked before the arrays are compared, because the name of a field explains an error
    better than the shape of an array.
    """
    different = _differences(config, metadata, "sde", "score", "model")
    if config.score.parameterization == LEVELS:
        # Its score depends on the number of levels, and on whether the data are bin centres.
        of_data = _differences(config, metadata, "data.levels", "data.dequantization")
        different += [each for each in of_data if each[0] == "data.levels" or "centre" in each]
    _refuse(different)
    tau = config.eval.tau or math.inf
    eps = smallest_time(config.sde.build(), config.training, config.data, tau)
    trained_eps = metadata["smallest_time"]
    # The time may be a result of float32 arithmetic, which rounds differently on another device.
    if not math.isclose(eps, trained_eps, rel_tol=1e-5):
        may = "; eval.smallest_time and sampling.smallest_time may differ"
        _refuse([("training.smallest_time", eps, trained_eps)], may)


def check_training(config: Config, metadata: Metadata) -> None:
    """Check that a training with ``config`` can continue from a checkpoint.

    The checkpoint contains statistics of the loss for each bin of the times, and the state of the
    optimizer, so the number of bins and the optimizer must be the same.
    """
    check_score(config, metadata)
    _refuse(_differences(config, metadata, "training.proposal_bins", "optim.name"))


def check_dequantizer(config: Config, metadata: Metadata) -> None:
    """Check that the parameters of a dequantizer's checkpoint fit ``config``."""
    different = _differences(config, metadata, "dequantizer.name", "dequantizer.model")
    _refuse(different, ", or move the folder dequantizer/ away to train another one")


def unseen_times(metadata: Metadata, sde: SDE, eps: float, section: str = "eval") -> list[str]:
    """A warning if ``eps`` is below the smallest time of the checkpoint's training, whose forward
    process is ``sde``.

    ``section`` is the section of the config whose ``smallest_time`` is ``eps``: "eval" or
    "sampling".
    """
    levels = metadata["config"]["training"]["discrete_levels"]
    first = smallest_trained_time(sde, levels, metadata["smallest_time"])
    if eps >= 0.99 * first:  # A smaller difference may be rounding.
        return []
    begin, known = (notation(value, ".3g") for value in (eps, first))
    return [
        f"{section}: times begin at t={begin}, but the network was trained only from t={known} on: "
        f"set --config.{section}.smallest_time={known}"
    ]


# Settings of the sections ``training`` and ``optim`` that do not change the training. The number of
# steps does change it under a cosine schedule.
WITHOUT_EFFECT = set(
    """
    num_steps steps_per_dispatch shard_state log_every checkpoint_every keep_last keep_every
    sample_every validate_every validation_images
    """.split()
)


def changed_settings(metadata: Metadata, ours: Metadata, prefix: str) -> list[str]:
    """The settings that differ between a checkpoint and the run that continues from it, each as
    "name before -> now". They are allowed, but later checkpoints record only the new values.

    ``metadata`` is that of the checkpoint, and ``ours`` that of the continued run. ``prefix``,
    which is empty or ``dequantizer.``, stands before the sections ``training`` and ``optim``.
    """
    before, now = (flatten_dict(m["config"], sep=".") for m in (metadata, ours))
    free = WITHOUT_EFFECT - ({"num_steps"} if now[f"{prefix}optim.schedule"] == "cosine" else set())
    sections = (f"{prefix}training.", f"{prefix}optim.")
    names = ["seed", "data.dequantization", "data.flip"]
    names += [f"{prefix}model.{k}" for k in ("dropout", "dtype", "clipped")]
    if prefix:  # A dequantizer's loss is the bound with these times and this smallest time.
        names += ["training.times", "eval.smallest_time"]
    names += [k for k in now if k.startswith(sections) and k.rpartition(".")[2] not in free]
    changed = [k for k in names if now.get(k) != before.get(k)]
    return [f"{k} {_said(before.get(k))} -> {_said(now.get(k))}" for k in changed]


def earlier_data(metadata: Metadata, examples: data.Examples) -> list[Json | None]:
    """The fingerprints of all data other than ``examples`` on which a checkpoint was trained.

    A training that continues with ``examples`` stores them in its metadata. None stands for unknown
    data.
    """
    before = [*metadata.get("earlier_data", []), metadata["data"]]
    different = [d for d in before if d is None or d["sha256"] != examples.fingerprint["sha256"]]
    return [d for i, d in enumerate(different) if d not in different[:i]]


def other_data(metadata: Metadata, ours: Metadata) -> list[str]:
    """Warnings if a checkpoint was trained on other data than those of ``ours``, the metadata of
    the present run, even if its training then continued on these. A warning names the fields that
    differ, or if there are none, what differs in the fingerprints."""
    warnings, earlier = [], metadata.get("earlier_data", [])
    for i, stored in enumerate([*earlier, metadata["data"]]):
        if stored is None:
            warnings.append("the checkpoint was converted: its training data are not known")
            continue
        present, first = ours["data"], i < len(earlier)
        data.imagenet32.check_comparable(stored["name"], present["name"])
        if stored["sha256"] != present["sha256"]:
            config = {} if first else metadata["config"]["data"]  # It is that of the last data.
            then = flatten_dict({**stored, "data": config}, sep=".")
            now = flatten_dict({**present, "data": ours["config"]["data"]}, sep=".")
            names = [k for k, v in now.items() if k not in SAME_DATA and then.get(k, v) != v]
            names = [name for name in names if name.startswith("data.")] or names
            said = [f"{k} is {_said(now[k])}, in training it was {_said(then[k])}" for k in names]
            about = f"the model was{' first' * first} trained on other data than this"
            warnings.append(f"{about}: {'; '.join(said)}")
    return warnings
