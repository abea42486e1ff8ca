"""The report of a work directory, from what the modes left there.

``eval`` leaves ``evaluation.json`` and ``per_image.npz``, ``sample`` leaves ``samples.npz``,
``quality`` leaves ``quality.json`` and ``neighbours.png``, ``train`` leaves ``metrics.jsonl``;
whichever comes last makes ``report.json`` and ``report.html``. The mode ``report`` makes them from
what is there, also for a run without an evaluation.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sbml import report
from sbml.data import ImageSet
from sbml.runtime import metrics
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import (
    EVALUATION,
    NEIGHBOURS,
    PER_IMAGE,
    QUALITY,
    SAMPLES,
    Workdir,
)

NEIGHBOURS_CAPTION = "The first samples, and below each the training image nearest to it."


DURING_TRAINING = re.compile(r"step_(\d+)\.png")


def write(
    workdir: epath.PathLike,
    load: Callable[[str], ImageSet],
    known: Mapping[str, Any] | None = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
) -> bool:
    """Write ``report.json`` and ``report.html``, if there is an evaluation or ``known`` is given.

    Args:
      workdir: the work directory.
      load: gives the images of a split. If they are not those that were evaluated, a warning says
        so and the report stays as it is.
      known: for a run that may be unfinished: its ``model``, its ``config`` and its ``training``
        (``report.progress``). The report then also names what is missing.
      rows: the rows of the metrics, if they are read already.

    Returns:
      Whether the report was written.
    """
    workdir = Workdir(workdir)
    evaluated = _evaluated(workdir, load)
    if evaluated is None and (known is None or workdir.has(EVALUATION)):
        return False
    content, images = evaluated or ({"title": workdir.name, "results": [], "warnings": []}, None)
    content = {**(known or {}), **content}
    drawn = _drawn(workdir, content)
    pictures = [] if drawn is None else _quality(workdir, content, drawn)
    if known is not None:
        pictures += _during_training(workdir) if drawn is None else []
        content["missing"] = _missing(workdir, content)
    report.write(
        workdir,
        content,
        table=None if images is None else workdir.read(PER_IMAGE),
        images=None if images is None else lambda ids: images.images[ids],
        levels=content["config"]["data"]["levels"] if images is None else images.levels,
        curves=metrics.read(workdir) if rows is None else rows,
        samples=None if drawn is None else drawn["images"],
        pictures=pictures,
    )
    return True


def _evaluated(
    workdir: Workdir, load: Callable[[str], ImageSet]
) -> tuple[dict[str, Any], ImageSet] | None:
    """``evaluation.json`` and its images; None if it is not there or of other images."""
    if not workdir.has(EVALUATION):
        return None
    evaluation = workdir.read(EVALUATION)
    split = evaluation["results"][0]["split"]
    images, evaluated = load(split), evaluation["data"][split]
    if images.fingerprint == evaluated:
        return evaluation, images
    logging.warning(
        "%s is of %s, this config has %s: the report stays as it is",
        *(workdir / EVALUATION, evaluated, images.fingerprint),
    )
    return None


def _drawn(workdir: Workdir, content: dict[str, Any]) -> dict[str, Any] | None:
    """``samples.npz``, described in ``content``; None if it is of another model than evaluated."""
    if not workdir.has(SAMPLES):
        return None
    drawn = workdir.read(SAMPLES)
    checkpoint = content.get("checkpoint", {})
    if any(int(drawn[name]) != value for name, value in checkpoint.items()):
        step = int(drawn["step"])
        logging.warning("samples.npz, of step %d, is of another model: not in the report", step)
        return None
    content["samples"] = {
        "count": len(drawn["images"]),
        "nfe_mean": float(drawn["nfe"].mean()),
        "nfe_max": int(drawn["nfe"].max()),
        "sampler": str(drawn["sampler"]),
        **({} if checkpoint else {"step": int(drawn["step"])}),
    }
    if failed := int(np.sum(drawn["failed"])):
        warning = f"{failed} of {len(drawn['images'])} samples are not finite"
        content["warnings"] = [*content["warnings"], warning]
    return drawn


def _quality(
    workdir: Workdir, content: dict[str, Any], drawn: dict[str, Any]
) -> list[tuple[str, bytes]]:
    """Put ``quality.json`` of the samples ``drawn`` into ``content``; its picture."""
    if not workdir.has(QUALITY):
        return []
    found = workdir.read(QUALITY)
    if found["images_crc32"] != tree_crc32(drawn["images"]):
        logging.warning("quality.json is of other samples: left out of the report")
        return []
    content["quality"] = found["values"]
    return [(NEIGHBOURS_CAPTION, (workdir / NEIGHBOURS).read_bytes())]


def _during_training(workdir: Workdir) -> list[tuple[str, bytes]]:
    """The newest picture that the training has left in ``samples/``."""
    folder = workdir / "samples"
    found = [(DURING_TRAINING.fullmatch(p.name), p) for p in folder.glob("*.png")]
    steps = {int(match[1]): path for match, path in found if match}
    if not steps:
        return []
    last = max(steps)
    return [(f"Samples during the training, at step {last:,}.", steps[last].read_bytes())]


def _missing(workdir: Workdir, content: Mapping[str, Any]) -> dict[str, str]:
    """What the report lacks, and the mode that makes it."""
    made = {"results": "eval", "samples": "sample", "quality": "quality"}
    lacking = {name: mode for name, mode in made.items() if not content.get(name)}
    if "samples" in lacking and "quality" in lacking:
        lacking["quality"] = "sample,quality"
    command = f"python -m sbml.main --workdir={workdir} --mode="
    return {name: command + mode for name, mode in lacking.items()}
