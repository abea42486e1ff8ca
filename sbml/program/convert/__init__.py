"""Conversion of checkpoints of other published code: one file in this folder for each code.

    NETWORK                              the name of the network in its checkpoints
    CODE                                 the name of the code in messages
    KEY                                  a key that only its checkpoints have
    convert(config, workdir, path, tree) writes it to ``workdir``; returns lines that say what it is

A model of diffusers is a folder instead of a file: see ``sbml.program.convert.diffusers``.
"""

from etils import epath

from sbml.program.config.config import Config
from sbml.program.convert import _files, diffusers, score_flow, vdm
from sbml.program.runtime import weights
from sbml.program.runtime.workdir import Workdir

SOURCES = (score_flow, vdm)


def convert(
    config: Config, workdir: Workdir, source: epath.PathLike, pixels: str = ""
) -> list[str]:
    """Convert ``source``: a folder of diffusers, or a checkpoint, or the newest one in a work
    directory, of one of the codes in ``SOURCES``. The returned lines say what was converted.

    The code that wrote the file is recognised by its content. ``pixels`` says how a model of
    diffusers was trained to see pixels, one of ``diffusers.PIXELS``.
    """
    if diffusers.recognises(source):
        return diffusers.convert(config, workdir.path, source, pixels)
    if pixels:
        raise ValueError(f"--pixels={pixels}: {source} is no folder of diffusers; leave it out")
    path = _files.find(source)
    tree = weights.read(path, "flax msgpack file")
    code = next((code for code in SOURCES if code.KEY in tree), None)
    if code is None:
        raise ValueError(
            f"{path} is a checkpoint of no known code: it has {sorted(tree)}; known are "
            + " and ".join(code.CODE for code in SOURCES)
        )
    if config.model.name != code.NETWORK:
        raise ValueError(
            f"config.model.name={config.model.name!r}, but {path} is of a {code.NETWORK!r}: take a "
            "config of that network"
        )
    return code.convert(config, workdir.path, path, tree)
