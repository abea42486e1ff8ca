"""Locks of a work directory: at most one process at a time runs a mode (train, eval, ...) in it.

Different modes may run at the same time. While a mode runs, the file ``.<mode>.json`` names its
process. On a disk there is also a file lock of the operating system, which is released when its
owner ends for any reason. An object store has no such locks, so the file alone is the lock there. A
process that is killed leaves it behind. On the same host, the next process sees that its owner does
not exist any more; on another one, the user must remove the file, as the error message says. In an
object store, two processes that start within the same second can both take the lock.
"""

import contextlib
import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from sbml.core.files import remote, write_whole
from sbml.core.types import Json

PATIENCE = 0.2  # seconds; longer than the instant for which :func:`owner` shares a file lock


class BusyError(ValueError):
    """Another process holds the lock of this folder for the same purpose."""


@contextlib.contextmanager
def hold(folder: epath.PathLike, purpose: str) -> Iterator[None]:
    """A context that holds the lock of ``folder`` for ``purpose``, a mode ("train" ...).

    All processes of one run enter it together; process 0 holds the lock for all of them. If another
    process holds it, entering raises a BusyError that says which one and what to do.
    """
    folder, first = epath.Path(folder), jax.process_index() == 0
    note, path = _paths(folder, purpose)
    lock = None if remote(folder) else FileLock(os.fspath(path), timeout=PATIENCE)
    busy = False
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            if lock:
                lock.acquire()
            else:
                busy = owner(folder, purpose) is not None
        except Timeout:
            busy = True
    if jax.process_count() > 1:
        busy = bool(multihost_utils.broadcast_one_to_all(np.asarray(busy)))
    if busy:
        killed = "" if lock else f". If it was killed, remove {note}"
        raise BusyError(
            f"{folder}: {_description(note)} does --mode={purpose} here. Wait for it, stop it, or "
            f"take another --workdir{killed}"
        )
    try:
        if first:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
            process = {"host": socket.gethostname(), "process": os.getpid()}
            about = {**process, "since": now, "command": command}
            write_whole(note, json.dumps(about, indent=1).encode())
        yield
    finally:
        if first:
            note.unlink(missing_ok=True)
            if lock:
                lock.release()


def owner(folder: epath.PathLike, purpose: str) -> str | None:
    """The process that holds the lock of ``folder`` for ``purpose``, in words; None if it is free.

    It takes no exclusive lock, so it does not disturb a process that holds the lock, or wants it.
    """
    note, path = _paths(epath.Path(folder), purpose)
    held = note.exists() and not _has_ended(note) if remote(folder) else _is_held(path)
    return _description(note) if held else None


def _paths(folder: epath.Path, purpose: str) -> tuple[epath.Path, epath.Path]:
    """The file that names the owner, and that of the operating system's lock."""
    return folder / f".{purpose}.json", folder / f".{purpose}.lock"


def _is_held(path: epath.Path) -> bool:
    """Whether a process holds the file lock ``path``: if so, no other can share it. filelock takes
    locks exclusively only, and cannot open one that another user made."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # For an instant; closing releases it.
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _has_ended(note: epath.Path) -> bool:
    """Whether the process of ``note`` is known to have ended.

    If it has the number of this process, it was an earlier one: in containers, process numbers
    start at 1 and repeat.
    """
    process = _read(note)
    if process.get("host") != socket.gethostname():
        return False
    try:
        os.kill(process["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # The process exists and belongs to another user.
        return False
    return process["process"] == os.getpid()


def _read(note: epath.Path) -> Json:
    try:
        return json.loads(note.read_text())
    except (OSError, ValueError):  # The file is being written or removed at this moment.
        return {}


def _description(note: epath.Path) -> str:
    """The process of ``note``, in words."""
    try:
        return "process {process} on {host}, since {since} ({command!r})".format(**_read(note))
    except KeyError:
        return "another process"
