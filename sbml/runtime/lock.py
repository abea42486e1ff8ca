"""Locks of a work directory: at most one process at a time runs a mode (train, eval, ...) in it.

Different modes may run at the same time. On a disk the lock is a file lock of the operating system,
which is released when its owner ends for any reason. An object store has no such locks. There the
lock is a file that names its owner, who renews it every 20 seconds. Another process may take it
over if it has not been renewed for 90 seconds, by clocks that must agree to within a minute, or if
the owner is known to be dead. Two processes that start within the same second can both acquire it;
the first of them logs an error when it tries to renew the lock and finds another owner.

Next to the lock, a file records the owner and the time, for the error message of a second process.
"""

import datetime
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time
from typing import Any, Self

import jax
import numpy as np
from absl import logging
from etils import epath
from filelock import FileLock, Timeout
from jax.experimental import multihost_utils

from sbml.runtime.files import write_whole

RENEWED_EVERY = 20.0  # seconds
STALE_AFTER = 90.0
PATIENCE = 0.2  # Longer than the instant for which :func:`owner` shares a file lock.


class BusyError(ValueError):
    """Another process holds the lock of this folder for the same purpose."""


class Lock:
    """A context manager that holds the lock of ``folder`` for ``purpose``, a mode ("train" ...).

    All processes of one run enter it together; process 0 holds the lock for all of them.

    Raises:
      BusyError: on entering, if another process holds the lock; the message says which one and
        what to do.
    """

    def __init__(self, folder: epath.PathLike, purpose: str) -> None:
        self._folder, self._purpose = epath.Path(folder), purpose
        self._note = self._folder / f".{purpose}.json"
        self._lock: FileLock | _Lease | None = None

    def __enter__(self) -> Self:
        error = self._acquire() if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            failed = multihost_utils.broadcast_one_to_all(np.asarray(error is not None))
            if failed and error is None:
                error = BusyError(f"process 0 could not lock {self._folder}: see its error message")
        if error is not None:
            raise error
        return self

    def __exit__(self, *_: object) -> None:
        lock, self._lock = self._lock, None
        if lock is not None:
            if not (isinstance(lock, _Lease) and lock.taken_over()):
                self._note.unlink(missing_ok=True)
            lock.release()

    def _acquire(self) -> BusyError | None:
        self._folder.mkdir(parents=True, exist_ok=True)
        remote = "://" in str(self._folder)
        path = self._folder / f".{self._purpose}.lock"
        lock = _Lease(path) if remote else FileLock(os.fspath(path), timeout=PATIENCE)
        try:
            lock.acquire()
        except Timeout:
            return BusyError(
                f"{self._folder}: {_description(self._note)} does --mode={self._purpose} here. "
                "Wait for it, stop it, or take another --workdir"
            )
        self._lock = lock
        write_whole(self._note, json.dumps(_owner(), indent=1).encode())
        return None


def owner(folder: epath.PathLike, purpose: str) -> str | None:
    """The process that holds the lock of ``folder`` for ``purpose``, in words; None if it is free.

    It takes no exclusive lock, so it does not disturb a process that holds the lock, or wants it.
    """
    folder = epath.Path(folder)
    path, note = folder / f".{purpose}.lock", folder / f".{purpose}.json"
    held = _Lease(path).held() if "://" in str(folder) else _is_held(path)
    return _description(note) if held else None


def _is_held(path: epath.Path) -> bool:
    """Whether a process holds the file lock ``path``: if so, no other can share it."""
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


def _owner() -> dict[str, Any]:
    """A description of this process for :func:`_description`."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return {"host": socket.gethostname(), "process": os.getpid(), "since": now, "command": command}


def _description(note: epath.Path) -> str:
    """The process that holds the lock, in words, from the file ``note``."""
    try:
        owner = json.loads(note.read_text())
        return "process {process} on {host}, since {since} ({command!r})".format(**owner)
    except (OSError, ValueError, KeyError):  # The file is being written at this moment.
        return "another process"


class _Lease:
    """A lock in an object store, with the interface of ``FileLock``."""

    _held: set[str] = set()  # by this process

    def __init__(self, path: epath.Path) -> None:
        self._path, self._stop = path, threading.Event()
        self._token = f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
        self._renewal = threading.Thread(target=self._renew, daemon=True)

    def held(self) -> bool:
        """Whether a process holds the lock."""
        owner = self._read()
        return owner is not None and not self._ended(owner)

    def acquire(self) -> None:
        """Acquire the lock. Raises ``Timeout`` if another process holds it."""
        if self.held():
            raise Timeout(str(self._path))
        self._write()
        self._held.add(str(self._path))
        self._renewal.start()

    def release(self) -> None:
        self._stop.set()
        self._renewal.join()
        self._held.discard(str(self._path))
        if not self.taken_over():
            self._path.unlink(missing_ok=True)

    def taken_over(self) -> bool:
        """Whether another process has taken the lock."""
        owner = self._read()
        return owner is not None and owner["token"] != self._token

    def _ended(self, owner: dict[str, Any]) -> bool:
        """Whether the lock was not renewed in time, or its owner was a process of this host that
        does not exist any more.

        An owner with the number of this process is an earlier process: in containers process
        numbers start at 1 and repeat.
        """
        if time.time() - owner["renewed"] > STALE_AFTER:
            return True
        host, process, _ = owner["token"].split(":")
        if host != socket.gethostname():
            return False
        if int(process) == os.getpid():
            return str(self._path) not in self._held
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # The process exists and belongs to another user.
            return False
        return False

    def _read(self) -> dict[str, Any] | None:
        try:
            return json.loads(self._path.read_text())
        except (FileNotFoundError, ValueError):
            return None

    def _write(self) -> None:
        content = {"token": self._token, "renewed": time.time()}
        self._path.write_text(json.dumps(content))

    def _renew(self) -> None:
        while not self._stop.wait(RENEWED_EVERY):
            try:
                if self.taken_over():
                    logging.error("%s was taken over: stop one of the two processes", self._path)
                    return
                self._write()
            except Exception as error:  # Stores raise many kinds; the next renewal may succeed.
                logging.warning("%s could not be renewed: %s", self._path, error)
