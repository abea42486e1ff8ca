"""The report of a work directory, from what the modes left there.

``eval`` leaves ``evaluation.json`` and ``per_image.npz``, ``sample`` leaves ``samples.npz``,
``quality`` leaves ``quality.json`` and ``neighbours.png``, ``train`` leaves ``metrics.jsonl``;
whichever comes last makes ``report.json`` and ``report.html``.
"""

from collections.abc import Callable

import numpy as np
from absl import logging
from etils import epath

from sbml import report
from sbml.data import ImageSet
from sbml.runtime import metrics
from sbml.runtime.checkpoint import tree_crc32
from sbml.runtime.workdir import (
    EVALUATION,
    NEIGHBOURS,
    PER_IMAGE,
    QUALITY,
    SAMPLES,
    Workdir,
)

NEIGHBOURS_CAPTION = "The first samples, and below each the training image nearest to it."


def write(workdir: epath.PathLike, load: Callable[[str], ImageSet]) -> None:
    """Write ``report.json`` and ``report.html``, if there is an evaluation.

    ``load`` gives the images of a split. If they are not those that were evaluated, a warning says
    so and the report stays as it is.
    """
    workdir = Workdir(workdir)
    if not workdir.has(EVALUATION):
        return
    evaluation = workdir.read(EVALUATION)
    split = evaluation["results"][0]["split"]
    images, evaluated = load(split), evaluation["data"][split]
    if images.fingerprint != evaluated:
        logging.warning(
            "%s is of %s, this config has %s: the report stays as it is",
            *(workdir / EVALUATION, evaluated, images.fingerprint),
        )
        return
    drawn = workdir.read(SAMPLES) if workdir.has(SAMPLES) else None
    if drawn is not None and any(
        int(drawn[name]) != value for name, value in evaluation["checkpoint"].items()
    ):
        step = int(drawn["step"])
        logging.warning("samples.npz, of step %d, is of another model: not in the report", step)
        drawn = None
    if drawn is not None:
        evaluation["samples"] = {
            "count": len(drawn["images"]),
            "nfe_mean": float(drawn["nfe"].mean()),
            "nfe_max": int(drawn["nfe"].max()),
            "sampler": str(drawn["sampler"]),
        }
        if failed := int(np.sum(drawn["failed"])):
            warning = f"{failed} of {len(drawn['images'])} samples are not finite"
            evaluation["warnings"] = [*evaluation["warnings"], warning]
    pictures = []
    if drawn is not None and workdir.has(QUALITY):
        found = workdir.read(QUALITY)
        if found["images_crc32"] == tree_crc32(drawn["images"]):
            evaluation["quality"] = found["values"]
            pictures = [(NEIGHBOURS_CAPTION, (workdir / NEIGHBOURS).read_bytes())]
        else:
            logging.warning("quality.json is of other samples: left out of the report")
    report.write(
        workdir,
        evaluation,
        table=workdir.read(PER_IMAGE),
        images=lambda ids: images.images[ids],
        levels=images.levels,
        curves=metrics.read(workdir),
        samples=None if drawn is None else drawn["images"],
        pictures=pictures,
    )
