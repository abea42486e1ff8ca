"""``history.jsonl``: which modes ran in a work directory, when, for how long, by which code, and on
which hardware.

A process that is killed by SIGKILL leaves no row, so the sums of the rows are lower bounds.
"""

import contextlib
import functools
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from sbml import __version__
from sbml.core.files import json_line, remote, write_whole
from sbml.core.types import Json

FILE = "history.jsonl"


@functools.cache
def origin() -> dict[str, str | int]:
    """``code``, ``hardware``, and ``devices``: the number of accelerators, 0 without one.

    ``code`` is the version and, in a checkout, the commit, with "modified" if a file was modified.
    It is read once, because a checkout can change while the program runs.
    """
    root, code = pathlib.Path(__file__).parents[3], f"sbml {__version__}"
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*"]
        with contextlib.suppress(OSError):  # There may be no git.
            done = subprocess.run(
                [*command, "--dirty=, modified"], capture_output=True, text=True, check=False
            )
            code = ", ".join(filter(None, [code, done.stdout.strip()]))
    cpu, cores = platform.processor() or platform.machine(), os.cpu_count() or 1
    with contextlib.suppress(OSError):  # Only Linux has this file.
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        cpu = names[0] if names else cpu
    kind, count = jax.devices()[0], jax.device_count()
    accelerator = "" if kind.platform == "cpu" else f"{count} x {kind.device_kind}, "
    hardware = f"{accelerator}{cpu}, {cores} cores"
    return {"code": code, "hardware": hardware, "devices": count if accelerator else 0}


@contextlib.contextmanager
def noted(workdir: epath.PathLike, mode: str, **about: object) -> Iterator[None]:
    """A context that adds a row when it is left: ``mode``, :func:`origin`, the date and time (UTC)
    of its ``start`` and ``end``, its ``seconds``, the ``cpu_seconds`` of this process times the
    number of processes, and ``about``."""
    found, start = origin(), time.time()
    clocks = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        seconds = time.perf_counter() - clocks[0]
        cpu = (time.process_time() - clocks[1]) * jax.process_count()
        row = {"mode": mode, **about, **found, "start": _utc(start), "end": _utc(time.time())}
        row |= {"seconds": seconds, "cpu_seconds": cpu}
        if jax.process_index() == 0:
            _append(epath.Path(workdir) / FILE, row)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _append(path: epath.Path, row: Json) -> None:
    """Add a row; a file that cannot be written does not end the mode."""
    line = json_line(row).encode()
    try:
        if remote(path):  # Object stores cannot append.
            write_whole(path, (path.read_bytes() if path.exists() else b"") + line)
            return
        with open(path, "a+b") as file:  # Two modes may end at once: each write is appended whole.
            if file.tell():  # The last row may have been cut off.
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except OSError as error:
        logging.warning("%s cannot be written: %s", path, error)
