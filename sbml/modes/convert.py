"""Converting a checkpoint of others' published code: ``--mode=convert --source=DIR``."""

from etils import epath
from ml_collections import ConfigDict

from sbml.convert import score_flow

FLAGS = ("source",)


def run(config: ConfigDict, workdir: epath.PathLike, source: epath.PathLike | None) -> None:
    """Convert the newest checkpoints in ``source``, a work directory of Song et al.'s code.

    Raises:
      ValueError: without a ``source``, or what ``score_flow.convert`` raises.
    """
    if not source:
        raise ValueError(
            "--mode=convert reads --source=DIR, a work directory of Song et al.'s code"
        )
    score_flow.convert(config, epath.Path(workdir), epath.Path(source))
