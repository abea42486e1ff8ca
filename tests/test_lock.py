"""One process at a time holds a lock. The error names the owner, and a dead owner has no lock."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from sbml.program.runtime import lock
from sbml.program.runtime.lock import BusyError
from sbml.program.runtime.workdir import Workdir

HOLD = """
import sys, time
from sbml.program.runtime.workdir import Workdir

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
def bucket(tmp_path, monkeypatch):
    """A work directory with the locks of an object store, here on a disk."""
    monkeypatch.setattr(lock, "remote", lambda path: True)
    return Workdir(tmp_path)


def note(workdir, host, process):
    owner = {"host": host, "process": process, "since": "noon", "command": "main.py"}
    (workdir / ".train.json").write_text(json.dumps(owner))


def test_a_lock_in_an_object_store_is_the_note_of_its_owner(bucket):
    assert bucket.owner("train") is None
    with bucket.lock("train"):
        assert json.loads((bucket / ".train.json").read_text())["process"] == os.getpid()
        with bucket.lock("eval"):  # Another purpose.
            pass
    assert not any(bucket.path.iterdir())
    (bucket / ".train.json").write_text("")  # Its owner is writing it.
    assert bucket.owner("train") == "another process"


def test_a_lock_in_an_object_store_is_taken_over_only_if_its_owner_is_dead(bucket):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = socket.gethostname()
    for host, process in [("elsewhere", 5), (here, os.getppid())]:
        note(bucket, host, process)
        message = rf"process {process} on {host}, .* here. Wait .* If it was killed, remove .*json"
        with pytest.raises(BusyError, match=message), bucket.lock("train"):
            pass
        assert str(process) in str(bucket.owner("train"))
    # os.getpid(): an earlier process may have had the number of this one.
    for process in (dead.pid, os.getpid()):
        note(bucket, here, process)
        assert bucket.owner("train") is None
        with bucket.lock("train"):
            pass


@pytest.mark.parametrize(
    "name", ["train", "history.jsonl", "tensorboard", ".eval.lock", "eval/x", "checkpoints"]
)
def test_a_link_to_a_place_outside_is_refused_before_anything_is_written(tmp_path, name):
    """The names are those of folders and of files that a mode would write through."""
    outside, workdir = tmp_path / "outside", tmp_path / "run"
    target = outside / "kept.txt" if "." in name else outside
    outside.mkdir()
    (outside / "kept.txt").write_text("kept")
    (workdir / name).parent.mkdir(parents=True)
    (workdir / name).symlink_to(target)
    purpose = "train" if name == "checkpoints" else "eval"
    message = f"{workdir / name} is a link to {target}, and --mode={purpose} .*: remove the link, "
    with pytest.raises(ValueError, match=message), Workdir(workdir).lock(purpose):
        pass
    assert [path.read_text() for path in outside.iterdir()] == ["kept"]
    assert [path.name for path in workdir.iterdir()] == [name.split("/")[0]]


def test_links_within_the_work_directory_and_to_it_are_followed(tmp_path):
    """Modes that only read checkpoints also find those of another run."""
    for name in ("run/train", "run/eval", "other/checkpoints", "other/dequantizer"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "run/here").symlink_to("train/../eval")
    (tmp_path / "run/nowhere").symlink_to("missing")
    (tmp_path / "link").symlink_to("run")
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "other/checkpoints")
    for purpose in ("eval", "sample", "train_dequantizer"):
        with Workdir(tmp_path / "link").lock(purpose):
            assert (tmp_path / f"run/.{purpose}.json").exists()
    (tmp_path / "run/checkpoints").unlink()
    (tmp_path / "run/dequantizer").symlink_to(tmp_path / "other/dequantizer")
    with Workdir(tmp_path / "link").lock("train"):
        pass
    with pytest.raises(ValueError, match="is a link to"):
        Workdir(tmp_path / "link").lock("train_dequantizer")
