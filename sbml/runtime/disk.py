"""Free space of a disk, which is checked before a write, and removal of incomplete files."""

import errno
import shutil

from etils import epath

OVERHEAD = 2**20  # bytes for the names, shapes and checksums of a checkpoint's arrays

# The errors of a disk without room: no bytes or inodes, or a user's quota.
FULL = (errno.ENOSPC, errno.EDQUOT)


def shortage(folder: epath.Path, size: int) -> str:
    """The reason why ``size`` + ``OVERHEAD`` bytes do not fit on the disk of ``folder``, or "".

    For an object store it is always "". The quota of a user is not known, so a write that exceeds
    the quota fails later.
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
