"""Converts a model of other published code:
``--mode=convert --source=DIR [--pixels=centred|unit|bins]``."""

from etils import epath

from sbml.convert import convert
from sbml.experiment.config import Config
from sbml.runtime.workdir import Workdir


def run(
    config: Config, workdir: Workdir, source: epath.PathLike | None = None, pixels: str = ""
) -> None:
    """Convert ``source`` (``sbml.convert``)."""
    if not source:
        raise ValueError(
            "--mode=convert needs --source=DIR, a work directory of Song et al.'s or VDM's code, "
            "or a folder of diffusers"
        )
    convert(config, workdir, source, pixels)
