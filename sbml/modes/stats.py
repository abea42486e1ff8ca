"""Computes the statistics of the training images for ``--mode=quality``: ``--mode=stats``."""

from etils import epath
from ml_collections import ConfigDict

from sbml.evaluation.quality import extractor, reference
from sbml.experiment.build import Experiment


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Compute the statistics of the training images and store them in the cache; ``workdir`` is not
    used."""
    experiment = Experiment(config)
    reference(experiment, extractor(config), experiment.images("train"))
