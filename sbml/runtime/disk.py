"""Room on a disk: asked for before a write, for what runs out of it half-way leaves its parts."""

import shutil

from etils import epath

# Beside the arrays of a checkpoint there are their names, shapes and checksums.
OVERHEAD = 2**20


def shortage(folder: epath.Path, size: int) -> str:
    """Why ``size`` bytes and a little more do not fit on the disk of ``folder``; empty if they do.

    An object store has no end. Nor does this know the quota of a user: such a write fails later.
    """
    if "://" in str(folder):
        return ""
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, size + OVERHEAD
    if free >= needed:
        return ""
    return f"the disk of {folder} is full: {free / 1e6:.1f} MB are free, {needed / 1e6:.1f} needed"


def remove_partial(folder: epath.Path, pattern: str) -> None:
    """Remove the folders in ``folder`` that match ``pattern``, as far as they can be removed."""
    if "://" not in str(folder):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
