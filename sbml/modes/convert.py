"""Converts a checkpoint of other published code: ``--mode=convert --source=DIR``."""

from etils import epath
from ml_collections import ConfigDict

from sbml.convert import SOURCES, _files

FLAGS = ("source",)


def run(config: ConfigDict, workdir: epath.PathLike, source: epath.PathLike | None) -> None:
    """Convert the newest checkpoint in ``source``, a file or a work directory of a known code.

    The content of the file shows which code wrote it.

    Raises:
      ValueError: there is no ``source``, no known code wrote it, ``config`` has another network, or
        the conversion fails.
    """
    if not source:
        raise ValueError(
            "--mode=convert needs --source=DIR, a work directory of Song et al.'s or VDM's code"
        )
    path = _files.find(source)
    tree = _files.load(path)
    for kind in SOURCES.values():
        if not kind.recognises(tree):
            continue
        if config.model.name != kind.NETWORK:
            raise ValueError(
                f"config.model.name={config.model.name!r}, but {path} is of a {kind.NETWORK!r}: "
                "take a config of that network"
            )
        kind.convert(config, epath.Path(workdir), path, tree)
        return
    raise ValueError(
        f"{path} is a checkpoint of no known code: it has {sorted(tree)}; known are "
        + " and ".join(kind.CODE for kind in SOURCES.values())
    )
