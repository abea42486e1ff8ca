"""Only one process holds a lock; the error names the owner; a dead owner holds no lock."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from sbml.runtime import lock
from sbml.runtime.lock import BusyError
from sbml.runtime.workdir import Workdir

HOLD = """
import sys, time
from sbml.runtime.workdir import Workdir

with Workdir(sys.argv[1]).lock("train"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_learns_the_owner_and_a_killed_owner_loses_the_lock(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        host = socket.gethostname()
        message = rf"{tmp_path}: process {process.pid} on {host}, since .* does --mode=train here"
        with pytest.raises(BusyError, match=message), Workdir(tmp_path).lock("train"):
            pass
        with Workdir(tmp_path).lock("eval"):  # Another purpose.
            pass
        process.send_signal(signal.SIGKILL)
    with Workdir(tmp_path).lock("train"):
        assert json.loads((tmp_path / ".train.json").read_text())["process"] == os.getpid()
    assert not (tmp_path / ".train.json").exists()


def test_the_lock_also_works_within_one_process_and_can_be_taken_again(tmp_path):
    for _ in range(2):
        workdir = Workdir(tmp_path)
        with workdir.lock("train"), pytest.raises(BusyError), Workdir(tmp_path).lock("train"):
            pass
    with pytest.raises(ZeroDivisionError), Workdir(tmp_path).lock("train"):
        raise ZeroDivisionError
    with Workdir(tmp_path).lock("train"):
        pass


@pytest.fixture
def lease(tmp_path, monkeypatch):
    """The lock of an object store, here on a disk."""
    monkeypatch.setattr(lock, "RENEWED_EVERY", 0.02)
    return lambda: lock._Lease(epath.Path(tmp_path) / ".train.lock")


def write(tmp_path, host, process, age):
    content = {"token": f"{host}:{process}:1", "renewed": time.time() - age}
    (tmp_path / ".train.lock").write_text(json.dumps(content))


def test_a_lease_is_renewed_while_it_is_held(tmp_path, lease):
    held = lease()
    held.acquire()
    first = json.loads((tmp_path / ".train.lock").read_text())["renewed"]
    with pytest.raises(lock.Timeout):
        lease().acquire()
    deadline = time.time() + 10
    while json.loads((tmp_path / ".train.lock").read_text() or "{}").get("renewed", 0) <= first:
        assert time.time() < deadline
        time.sleep(0.01)
    held.release()
    assert not (tmp_path / ".train.lock").exists()
    lease().acquire()


def test_a_lease_is_taken_over_only_if_its_owner_is_dead_or_silent(tmp_path, lease):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, parent = socket.gethostname(), os.getppid()
    for host, process, age, ends in [
        ("elsewhere", 5, 1, False),
        ("elsewhere", 5, 91, True),
        (here, parent, 1, False),
        (here, parent, 91, True),
        (here, dead.pid, 1, True),
        (here, os.getpid(), 1, True),  # An earlier process with this number.
    ]:
        write(tmp_path, host, process, age)
        taken = lease()
        if ends:
            taken.acquire()
            taken.release()
        else:
            with pytest.raises(lock.Timeout):
                taken.acquire()


def test_an_owner_whose_lease_is_overwritten_logs_an_error(tmp_path, lease, caplog):
    held = lease()
    held.acquire()
    write(tmp_path, "elsewhere", 5, 0)
    held._renewal.join(timeout=10)
    assert "was taken over" in caplog.text
    held.release()  # The file is the other owner's.
    assert json.loads((tmp_path / ".train.lock").read_text())["token"] == "elsewhere:5:1"


def test_the_note_of_a_new_owner_is_kept(tmp_path, lease, monkeypatch):
    monkeypatch.setattr(lock, "FileLock", lambda path, timeout: lock._Lease(epath.Path(path)))
    with Workdir(tmp_path).lock("train"):
        write(tmp_path, "elsewhere", 5, 0)
        (tmp_path / ".train.json").write_text("{}")
    assert (tmp_path / ".train.json").read_text() == "{}"
    assert (tmp_path / ".train.lock").exists()


def test_any_error_of_a_store_is_survived(tmp_path, lease, monkeypatch, caplog):
    """Clients of object stores raise others than OSError for failures of the server."""
    held, write_now = lease(), lock._Lease._write
    failures = iter([RuntimeError("503"), ValueError("429"), OSError("reset")])

    def write(self):
        if self is held and self._renewal.is_alive() and (error := next(failures, None)):
            raise error
        write_now(self)

    monkeypatch.setattr(lock._Lease, "_write", write)
    held.acquire()
    first = json.loads((tmp_path / ".train.lock").read_text())["renewed"]
    deadline = time.time() + 10
    while json.loads((tmp_path / ".train.lock").read_text() or "{}").get("renewed", 0) <= first:
        assert time.time() < deadline
        time.sleep(0.01)
    held.release()
    assert all(reason in caplog.text for reason in ("503", "429", "reset"))
