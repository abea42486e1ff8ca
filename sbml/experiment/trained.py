"""Compares the config and data that are stored in a checkpoint with those of the present run."""

import math
from collections.abc import Callable
from typing import Any

from flax.traverse_util import flatten_dict

from sbml import data
from sbml.experiment import architecture, noise
from sbml.experiment.config import Config
from sbml.experiment.data import Data
from sbml.experiment.score import Process
from sbml.experiment.training import Training
from sbml.runtime.manifest import OtherModelError
from sbml.score import LEVELS
from sbml.sdes import SDE

Metadata = dict[str, Any]


def _noise(metadata: Metadata) -> tuple[SDE, Training, float]:
    """The forward process, the training settings and the smallest time of a checkpoint.

    A converted checkpoint has no smallest time. Such a model was trained from the paper's smallest
    time on, also on bin centres.
    """
    stored = metadata["config"]
    sde = Process.of(stored["sde"], complete=False).build()
    training = Training.of(stored["training"], complete=False)
    data = Data.of(stored["data"], complete=False)
    eps = metadata.get("smallest_time")
    return sde, training, noise.smallest_time(sde, training, data, math.inf) if eps is None else eps


def check_score(config: Config, metadata: Metadata) -> None:
    """Check that the parameters of a checkpoint give the same score with ``config``.

    Raises:
      ValueError: they do not; the message names the fields that differ.
    """
    architecture.check(config.plain(), metadata["config"], ("sde", "score", "model"))
    if config.score.parameterization == LEVELS:
        _check_levels(config.data, Data.of(metadata["config"]["data"], complete=False))
    tau = config.eval.tau or math.inf
    eps = noise.smallest_time(config.sde.build(), config.training, config.data, tau)
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
    first = noise.smallest_trained_time(*_noise(metadata))
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
    architecture.check(config.plain(), metadata["config"], ("dequantizer.model",))


# Settings of the sections ``training`` and ``optim`` that do not change the training. The number of
# steps does change it under a cosine schedule.
FREE = {
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
    free = FREE - ({"num_steps"} if now[f"{field}optim.schedule"] == "cosine" else set())
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
