"""Computes the statistics of the training images for ``--mode=quality``: ``--mode=stats``."""

from sbml.program.config.build import Experiment
from sbml.program.modes.quality import extractor, reference


def run(experiment: Experiment) -> None:
    """Compute the statistics of the training images and store them in the cache."""
    reference(experiment, extractor(experiment.config), experiment.images("train"))
