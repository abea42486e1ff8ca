"""Checkpoints of others' published code: one file for each source, found from this folder.

A new source is a new file here that exports

NETWORK                              the network that its checkpoints are of
CODE                                 what messages call it
recognises(tree)                     whether a file of this content is one of its checkpoints
convert(config, workdir, path, tree) writes the checkpoint to ``workdir``
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

SOURCES: dict[str, Any] = {
    found.name: import_module(f"{__name__}.{found.name}")
    for found in iter_modules(__path__)
    if not found.name.startswith("_")
}
