"""Conversion of checkpoints of other published code: one file in this folder for each source.

To add a source, add a file here that exports

NETWORK                              the name of the network in its checkpoints
CODE                                 the name of the code in messages
recognises(tree)                     whether a file with the content ``tree`` is such a checkpoint
convert(config, workdir, path, tree) converts the checkpoint and writes it to ``workdir``
"""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

SOURCES: dict[str, Any] = {
    file.name: import_module(f"{__name__}.{file.name}")
    for file in iter_modules(__path__)
    if not file.name.startswith("_")
}
