"""Computes the statistics of the training images for ``--mode=quality``: ``--mode=stats``."""

from sbml.evaluation.quality import extractor, reference
from sbml.experiment.build import Experiment


def run(experiment: Experiment) -> None:
    """Compute the statistics of the training images and store them in the cache."""
    reference(experiment, extractor(experiment.config), experiment.images("train"))
