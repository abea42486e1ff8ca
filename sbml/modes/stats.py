"""Statistics of the training images, which ``--mode=quality`` needs: ``--mode=stats``."""

from etils import epath
from ml_collections import ConfigDict

from sbml.evaluation.quality import extractor, reference
from sbml.experiment.build import Experiment


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Compute and keep the statistics of the training images; ``workdir`` is not touched."""
    experiment = Experiment(config)
    reference(experiment, extractor(config), experiment.images("train"))
