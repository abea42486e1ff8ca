"""Compares the samples with the training images: ``--mode=quality``."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import logging

from sbml.evaluation.quality import distances_of_features, extractor, memorisation, reference
from sbml.evaluation.samples import grid
from sbml.experiment import trained
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.report.plots import write_png
from sbml.report.result import strict
from sbml.runtime.trees import tree_crc32
from sbml.runtime.workdir import NEIGHBOURS, QUALITY, SAMPLES, Workdir


def check(experiment: Experiment, workdir: Workdir, before: Sequence[str]) -> None:
    """Check that there are or will be samples, and that the extractor can be made."""
    if not (workdir.has(SAMPLES) or "sample" in before):
        raise ValueError(f"no {SAMPLES} in {workdir}: draw samples first (--mode=sample,quality)")
    extractor(experiment.config)


def run(experiment: Experiment, workdir: Workdir) -> None:
    """Compare ``samples.npz`` of ``workdir`` with the training images: distances of features (FID
    and similar metrics), and of pixels to the nearest training image.

    Writes ``quality.json`` and ``neighbours.png``, and the report again if there is an evaluation.
    """
    config, read = experiment.config, workdir.read(SAMPLES)
    extract, images, step = extractor(config), read["images"], int(read["step"])
    checkpoints = config.training.checkpoints(workdir)
    metadata, newest = checkpoints.metadata(), max(checkpoints.steps(), default=step)
    if newest != step:
        logging.warning(
            "%s is of step %d, but the newest checkpoint is of step %d: to compare that, draw new "
            "samples (--mode=sample,quality)",
            *(workdir / SAMPLES, step, newest),
        )
    if failed := int(np.sum(read["failed"])):
        logging.warning("%d of %d samples are not finite", failed, len(images))
    if len(images) < 2:
        raise ValueError(
            f"{workdir / SAMPLES} has one image: distances need at least two; draw more "
            "(--mode=sample,quality --config.sampling.num_images=1000)"
        )
    train, test = experiment.images("train"), experiment.images("test")
    warnings = [] if metadata is None else trained.other_data(metadata, train)
    for warning in warnings:
        logging.warning(warning)
    flip = (metadata or {}).get("config", {}).get("data", {}).get("flip", config.data.flip)
    values = distances_of_features(extract, images, reference(experiment, extract, train))
    distances_to_training, shown = memorisation(images, train, test, flip)
    if jax.process_index() > 0:
        return
    values |= distances_to_training
    write_png(workdir / NEIGHBOURS, grid(experiment, shown, columns=len(shown) // 2))
    result = {
        **{"step": step, "values": values, "warnings": warnings, "data": train.fingerprint},
        "images_crc32": tree_crc32(images),
        "neighbours_crc32": zlib.crc32(workdir.read_png(NEIGHBOURS)),
    }
    workdir.write(QUALITY, strict(result))
    summary.write(workdir, config.data.images)
    print(f"{len(images)} samples of step {step}, by {read['sampler']}")
    for name, value in values.items():
        print(f"{name}: {value:.4g}")
