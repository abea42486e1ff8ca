"""Comparing the samples with the training images: ``--mode=quality``."""

import json

import jax
import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sbml import distances, report
from sbml.distances import Moments
from sbml.evaluation import samples
from sbml.evaluation.quality import extractor, features_of, memory, reference
from sbml.experiment.build import Experiment
from sbml.report import summary
from sbml.runtime.checkpoint import tree_crc32
from sbml.runtime.files import write_whole
from sbml.runtime.parts import read_npz


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Hold ``samples.npz`` of ``workdir`` against the training images.

    Writes ``quality.json``, ``neighbours.png``, and the report anew where there is an evaluation.

    Raises:
      ValueError: without samples, fewer than two of them, or without the extractor's weights.
    """
    experiment, workdir = Experiment(config), epath.Path(workdir)
    extract = extractor(config)
    if not (workdir / summary.SAMPLES).exists():
        raise ValueError(f"no {summary.SAMPLES} in {workdir}: draw some first (--mode=sample)")
    drawn = read_npz(workdir / summary.SAMPLES)
    if failed := int(np.sum(drawn.get("failed", False))):  # Not in files of earlier versions.
        logging.warning("%d of %d samples are not finite", failed, len(drawn["images"]))
    if len(drawn["images"]) < 2:
        raise ValueError(
            f"{workdir / summary.SAMPLES} has one image: distances need two at least; draw more "
            "(--mode=sample,quality --config.sampling.num_images=1000)"
        )
    train, test = experiment.images("train"), experiment.images("test")
    known = reference(experiment, extract, train)
    looks = zip(*features_of(extract, drawn["images"], "samples"), strict=True)
    features, probabilities = (np.concatenate(part) for part in looks)
    n = len(features)
    if n < features.shape[1]:
        logging.warning(
            "%d samples for %d features: a distance of so few says little", n, features.shape[1]
        )
    frechet, kernel, score = extract.names
    values = {
        f"{frechet} n={n}": distances.frechet(Moments.of(features), known.moments),
        f"{kernel} n={n}": distances.kernel(features, known.features),
        f"{score} n={n}": distances.inception_score(probabilities),
    }
    distances_to_training, rows = memory(drawn["images"], train, test, config.data.flip)
    if jax.process_index() > 0:
        return
    values |= distances_to_training
    images_crc32 = tree_crc32(drawn["images"])
    result = {"step": int(drawn["step"]), "images_crc32": images_crc32, "values": values}
    write_whole(workdir / summary.QUALITY, json.dumps(report.strict(result), indent=1).encode())
    picture = samples.grid(experiment, rows, columns=len(rows) // 2)
    report.write_png(workdir / summary.NEIGHBOURS, picture)
    summary.write(workdir, experiment.images)
    for name, value in values.items():
        print(f"{name}: {value:.4g}")
