"""Converts a model of other published code:
``--mode=convert --source=DIR [--pixels=centred|unit|bins]``."""

from etils import epath

from sbml.program.config.config import Config
from sbml.program.convert import convert
from sbml.program.runtime.workdir import Workdir


def run(
    config: Config, workdir: Workdir, source: epath.PathLike | None = None, pixels: str = ""
) -> None:
    """Convert ``source`` (``sbml.program.convert``), and print what was converted."""
    if not source:
        raise ValueError(
            "--mode=convert needs --source=DIR, a work directory of Song et al.'s or VDM's code, "
            "or a folder of diffusers"
        )
    print("\n".join(convert(config, workdir, source, pixels)))
