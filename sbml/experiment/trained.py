"""Compares what a checkpoint says of its training with the config and the data of now."""

from collections.abc import Callable
from typing import Any

from absl import logging

from sbml import data
from sbml.experiment import architecture, noise
from sbml.experiment.config import Config
from sbml.experiment.data import Data
from sbml.experiment.score import Process
from sbml.experiment.training import Training
from sbml.runtime.checkpoint import OtherModelError
from sbml.sdes import SDE

Metadata = dict[str, Any]


def _parts(metadata: Metadata) -> tuple[SDE, Training, Data]:
    """What decides the noise of a checkpoint's training, as any version has stored it."""
    stored = metadata["config"]
    process = Process.of(stored["sde"], complete=False)
    training = Training.of(stored["training"], complete=False)
    return process.build(), training, Data.of(stored["data"], complete=False)


def check_score(config: Config, metadata: Metadata) -> None:
    """Refuse a checkpoint whose parameters are another score's under ``config``.

    Raises:
      ValueError: naming what differs.
    """
    architecture.check(config.plain(), metadata["config"], ("sde", "score", "model"))
    ours = noise.smallest_time(config.sde.build(), config.training, config.data)
    theirs = noise.smallest_time(*_parts(metadata))
    if ours != theirs:
        raise ValueError(
            f"the checkpoint's smallest time is {theirs}, here it is {ours}: set "
            f"--config.training.smallest_time={theirs}; eval.smallest_time and "
            "sampling.smallest_time are free"
        )


def unseen_times(metadata: Metadata, eps: float, section: str = "eval") -> list[str]:
    """A warning if times from ``eps`` on have noise that the training never showed.

    ``section`` is whose ``smallest_time`` it is: eval's or sampling's.
    """
    first = noise.trained_from(*_parts(metadata))
    if eps >= 0.99 * first:  # A little less is rounding.
        return []
    return [
        f"{section}: times from t={eps:.3g} on, but training showed no noise of before "
        f"t={first:.3g}: what the network says there is a guess "
        f"(--config.{section}.smallest_time={first:.3g})"
    ]


def of_another_model(check: Callable[[Metadata], None], metadata: Metadata) -> None:
    """Let ``check`` refuse a checkpoint by its metadata, before its arrays are compared.

    A difference of a field says more than one of an array's shape.

    Raises:
      OtherModelError: where ``check`` raises a ValueError.
    """
    try:
        check(metadata)
    except ValueError as error:
        raise OtherModelError(str(error)) from error


def check_dequantizer(config: Config, metadata: Metadata) -> None:
    """The same of a dequantizer's."""
    architecture.check(config.plain(), metadata["config"], ("dequantizer.model",))


# What a run may change without training otherwise; under a cosine, the number of steps is none.
FREE = {
    *("num_steps", "steps_per_dispatch", "shard_state", "log_every"),
    *("checkpoint_every", "keep_last", "keep_every", "sample_every"),
}


def warn_if_trained_otherwise(metadata: Metadata, ours: Metadata, field: str) -> None:
    """Compare how a checkpoint was trained with how it is to go on, by ``ours`` of its provenance.

    ``field`` precedes the names of ``training`` and ``optim``: empty, or ``dequantizer.``. To go on
    otherwise is allowed, but later checkpoints will only tell of the new settings.
    """

    def part(config: dict[str, Any]) -> dict[str, Any]:
        return config[field.rstrip(".")] if field else config

    cosine = part(ours["config"])["optim"]["schedule"] == "cosine"
    free = FREE - ({"num_steps"} if cosine else set())

    def settings(config: dict[str, Any]) -> dict[str, Any]:
        sections = {s: part(config)[s] for s in ("training", "optim")}
        found = {f"{field}{s}.{k}": v for s, fields in sections.items() for k, v in fields.items()}
        found = {name: v for name, v in found.items() if name.rpartition(".")[2] not in free}
        data = {f"data.{k}": config["data"][k] for k in ("dequantization", "flip")}
        return {"seed": config["seed"], **data, **found}

    before, now = settings(metadata["config"]), settings(ours["config"])
    changed = [f"{k} {before.get(k)} -> {v}" for k, v in now.items() if before.get(k) != v]
    if changed:
        logging.warning("training goes on otherwise than it began: %s", ", ".join(changed))


def warn_if_other_data(metadata: Metadata, images: data.ImageSet) -> list[str]:
    """Compare the training data in a checkpoint's ``metadata`` with ``images``, loudly.

    Returns:
      The warnings, for a report; none if they are the same.

    Raises:
      ValueError: for the two versions of ImageNet 32x32, whose numbers must not be mixed.
    """
    theirs = metadata["data"]
    if theirs is None:
        return ["the checkpoint was converted: what data the model was trained on is not known"]
    ours = images.fingerprint
    data.imagenet32.check_comparable(theirs["name"], ours["name"])
    if theirs["sha256"] == ours["sha256"]:
        return []
    changed = {k: (theirs.get(k), v) for k, v in ours.items() if theirs.get(k) != v}
    message = f"the model was trained on other data than this: {changed}"
    logging.warning("%s\n  %s\n%s", "!" * 80, message, "!" * 80)
    return [message]
