"""Compares the config and data that are stored in a checkpoint with those of the present run.

With another SDE or nonlinearity the parameters of a checkpoint would give wrong results, although
their shapes fit. A converted checkpoint may fit no config of this package. So ``architecture.json``
in its work directory holds the fields that fit it, and they replace those of the config
(:func:`of_workdir`).
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

from etils import epath
from flax.traverse_util import flatten_dict

from sbml import data
from sbml.experiment.config import Config
from sbml.experiment.data import Data
from sbml.experiment.fields import plain
from sbml.experiment.score import Process
from sbml.experiment.training import Training, smallest_time, smallest_trained_time
from sbml.runtime.manifest import OtherModelError
from sbml.runtime.workdir import ARCHITECTURE, Workdir
from sbml.score import LEVELS
from sbml.sdes import SDE

Metadata = dict[str, Any]
Sections = dict[str, dict[str, Any]]

# Fields of a network or dequantizer that may differ from those in the checkpoint's config.
FREE = ("clipped", "dropout", "dtype", "init_scale", "remat")


def write_architecture(workdir: epath.PathLike, sections: Sections) -> None:
    """Write ``sections``, the fields of "model", "dequantizer.model" ... by name, to
    ``workdir/architecture.json``, except for the fields in ``FREE``."""
    fixed = {
        name: {field: value for field, value in fields.items() if field not in FREE}
        for name, fields in sections.items()
    }
    Workdir(workdir).write(ARCHITECTURE, fixed)


def of_workdir(config: Config, workdir: Workdir) -> Config:
    """``config`` with the fields of ``architecture.json`` in ``workdir``, if there is such a file.
    Each changed field is printed."""
    if not workdir.has(ARCHITECTURE):
        return config
    changed, lines = with_fields(config, workdir.read(ARCHITECTURE))
    for line in lines:
        print(f"{workdir / ARCHITECTURE}: {line}")
    return changed


def with_fields(config: Config, sections: Sections) -> tuple[Config, list[str]]:
    """``config`` with the fields in ``sections`` replaced, and a line for each change.

    Raises:
      ValueError: the config has another network or SDE, or lacks a field of ``sections``.
    """
    lines: list[str] = []
    for name, fields in sections.items():
        config = _with_fields(config, name, name.split("."), fields, lines)
    return config, lines


def _with_fields(
    section: Any, name: str, path: list[str], fields: dict[str, Any], lines: list[str]
) -> Any:
    """``section`` with ``fields`` replaced in the section at ``path`` within it."""
    if path:
        inner = _with_fields(getattr(section, path[0]), name, path[1:], fields, lines)
        return section.replace(**{path[0]: inner})
    present = section.values()
    if "name" in fields and fields["name"] != present.get("name"):
        raise ValueError(
            f"config.{name}.name={present.get('name')!r}, but the checkpoint's is "
            f"{fields['name']!r}: take a config with that {name}.name"
        )
    changed = section.replace(**fields)
    lines += [
        f"config.{name}.{field} is {present[field]!r}, the checkpoint's is {value!r}"
        for field, value in changed.values().items()
        if value != present[field]
    ]
    return changed


def check_sections(
    config: dict[str, Any], trained: dict[str, Any], sections: Iterable[str]
) -> None:
    """Check that ``config`` and ``trained``, the config of the checkpoint, agree in ``sections``.

    Both are plain JSON values. A field that only one of the two has comes from another version of
    the package and is ignored, as are the fields in ``FREE``.

    Raises:
      ValueError: they differ; the message names the fields with both values.
    """
    differences = []
    for name in sections:
        fields, trained_fields = (
            functools.reduce(lambda node, part: node.get(part, {}), name.split("."), tree)
            for tree in (config, trained)
        )
        differences += [
            f"config.{name}.{field} is {fields[field]!r}, the checkpoint's is {value!r}"
            for field, value in trained_fields.items()
            if field in fields and field not in FREE and fields[field] != plain(value)
        ]
    if differences:
        raise ValueError(
            f"the checkpoint is of another model: {'; '.join(differences)}. Use the --config of "
            "its training, or set these fields"
        )


def _noise(metadata: Metadata) -> tuple[SDE, Training, float]:
    """The forward process, the training settings and the smallest time of a checkpoint.

    A converted checkpoint has no smallest time. Such a model was trained from the paper's smallest
    time on, also on bin centres.
    """
    stored = metadata["config"]
    sde = Process.known(stored["sde"]).build()
    training, data = Training.known(stored["training"]), Data.known(stored["data"])
    eps = metadata.get("smallest_time")
    return sde, training, smallest_time(sde, training, data, math.inf) if eps is None else eps


def check_score(config: Config, metadata: Metadata) -> None:
    """Check that the parameters of a checkpoint give the same score with ``config``.

    Raises:
      ValueError: they do not; the message names the fields that differ.
    """
    check_sections(config.plain(), metadata["config"], ("sde", "score", "model"))
    if config.score.parameterization == LEVELS:
        _check_levels(config.data, Data.known(metadata["config"]["data"]))
    tau = config.eval.tau or math.inf
    eps = smallest_time(config.sde.build(), config.training, config.data, tau)
    _, _, trained_eps = _noise(metadata)
    # It may come from float32 arithmetic, which rounds differently on another device.
    if not math.isclose(eps, trained_eps, rel_tol=1e-5):
        raise ValueError(
            f"the checkpoint's smallest time is {trained_eps}, but the config's is {eps}: set "
            f"--config.training.smallest_time={trained_eps}; eval.smallest_time and "
            "sampling.smallest_time may differ"
        )


def _check_levels(ours: Data, stored: Data) -> None:
    """Check the data of an integer denoiser: its score depends on the number of levels, and on
    whether the data are bin centres.

    Raises:
      ValueError: one of the two differs; the message names the field.
    """
    same = {"levels": ours.levels == stored.levels, "dequantization": ours.kind == stored.kind}
    for name, is_same in same.items():
        if not is_same:
            value = getattr(stored, name)
            raise ValueError(
                f"data.{name} is {getattr(ours, name)}, the checkpoint's is {value}: the score of "
                f"an integer denoiser depends on it, so set --config.data.{name}={value}"
            )


def check_training(config: Config, metadata: Metadata) -> None:
    """Check that a training with ``config`` can go on from a checkpoint.

    Raises:
      ValueError: it cannot; the message names the fields that differ.
    """
    check_score(config, metadata)
    bins = config.training.proposal_bins
    trained_bins = metadata["config"]["training"].get("proposal_bins", bins)
    if bins != trained_bins:
        raise ValueError(
            f"training.proposal_bins is {bins}, the checkpoint's is {trained_bins}: it has "
            "statistics of the loss for each bin, so set "
            f"--config.training.proposal_bins={trained_bins}"
        )


def unseen_times(metadata: Metadata, eps: float, section: str = "eval") -> list[str]:
    """A warning if ``eps`` is below the smallest time of the checkpoint's training.

    ``section`` is the section of the config whose ``smallest_time`` is ``eps``: "eval" or
    "sampling".
    """
    first = smallest_trained_time(*_noise(metadata))
    if eps >= 0.99 * first:  # A smaller difference may be rounding.
        return []
    return [
        f"{section}: times begin at t={eps:.3g}, but the network was trained only from "
        f"t={first:.3g} on: set --config.{section}.smallest_time={first:.3g}"
    ]


def of_another_model(check: Callable[[Metadata], None], metadata: Metadata) -> None:
    """Run ``check`` on a checkpoint's metadata; its ValueError becomes an ``OtherModelError``.

    This comes before the comparison of the arrays, since the name of a field that differs explains
    more than the shape of an array.

    Raises:
      OtherModelError: ``check`` raises a ValueError.
    """
    try:
        check(metadata)
    except ValueError as error:
        raise OtherModelError(str(error)) from error


def check_dequantizer(config: Config, metadata: Metadata) -> None:
    """Check that the parameters of a dequantizer's checkpoint fit ``config``.

    Raises:
      ValueError: they do not; the message names the fields that differ.
    """
    stored = metadata["config"].get("dequantizer", {})
    ours, theirs = config.dequantizer.name, stored.get("name", "variational")
    if ours != theirs:
        raise ValueError(
            f"the trained dequantizer is {theirs}, but dequantizer.name={ours}: use the --config "
            "of its training, or move the folder dequantizer/ away to train another one"
        )
    check_sections(config.plain(), metadata["config"], ("dequantizer.model",))


# Settings of the sections ``training`` and ``optim`` that do not change the training. The number of
# steps does change it under a cosine schedule.
WITHOUT_EFFECT = {
    *("num_steps", "steps_per_dispatch", "shard_state", "log_every"),
    *("checkpoint_every", "keep_last", "keep_every", "sample_every"),
}


def changed_settings(metadata: Metadata, ours: Metadata, field: str) -> list[str]:
    """The settings with which training continues otherwise than the checkpoint's ``metadata`` say.

    Other settings are allowed, but later checkpoints record only the new ones.

    Args:
      metadata: the metadata of the checkpoint.
      ours: the metadata of the continued run.
      field: the prefix of the sections ``training`` and ``optim``: empty or ``dequantizer.``.

    Returns:
      "name before -> now" for each of them.
    """
    before, now = (flatten_dict(m["config"], sep=".") for m in (metadata, ours))
    free = WITHOUT_EFFECT - ({"num_steps"} if now[f"{field}optim.schedule"] == "cosine" else set())
    sections = (f"{field}training.", f"{field}optim.")
    names = ["seed", "data.dequantization", "data.flip"]
    names += [f"{field}model.{k}" for k in ("dropout", "dtype", "clipped")]
    if field:  # A dequantizer's loss is the bound with these times and this smallest time.
        names += ["training.times", "eval.smallest_time"]
    names += [k for k in now if k.startswith(sections) and k.rpartition(".")[2] not in free]
    return [f"{k} {before.get(k)} -> {v}" for k in names if (v := now.get(k)) != before.get(k)]


def earlier_data(metadata: Metadata, images: data.ImageSet) -> list[dict[str, Any] | None]:
    """The fingerprints of the data other than ``images`` that a checkpoint was trained on, for the
    metadata of a training that continues with ``images``. None stands for data that are not known.
    """
    before = [*metadata.get("earlier_data", []), metadata["data"]]
    different = [d for d in before if d is None or d["sha256"] != images.fingerprint["sha256"]]
    return [d for i, d in enumerate(different) if d not in different[:i]]


def other_data(metadata: Metadata, images: data.ImageSet) -> list[str]:
    """Warnings if a checkpoint was trained on other data than ``images``, also if it was trained
    on ``images`` afterwards.

    Raises:
      ValueError: the data are the two versions of ImageNet 32x32, which must not be compared.
    """
    warnings = []
    earlier = metadata.get("earlier_data", [])
    for i, stored in enumerate([*earlier, metadata["data"]]):
        if stored is None:
            warnings.append("the checkpoint was converted: its training data are not known")
            continue
        present = images.fingerprint
        data.imagenet32.check_comparable(stored["name"], present["name"])
        if stored["sha256"] != present["sha256"]:
            changed = {k: (stored.get(k), v) for k, v in present.items() if stored.get(k) != v}
            first = " first" if i < len(earlier) else ""
            warnings.append(f"the model was{first} trained on other data than this: {changed}")
    return warnings
