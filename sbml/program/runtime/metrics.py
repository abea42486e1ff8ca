"""Training metrics by step: ``metrics.jsonl`` for programs, tensorboard for people."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from absl import logging
from etils import epath

from sbml.core.files import json_line, remote, without_crc32, write_whole
from sbml.core.types import Json

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter

FILE = "metrics.jsonl"
EARLIER = "metrics.jsonl.earlier"  # rows of a training that was begun again at step 0


def read(workdir: epath.PathLike, name: str = FILE) -> list[Json]:
    """The rows of the file ``name``, in order; an empty list if there is no file.

    A damaged line is left out with a warning that names it. A process that is killed while writing
    leaves at most one incomplete line, the last one; this line is left out without a warning.
    """
    return _parse(epath.Path(workdir) / name)[0]


def _parse(path: epath.Path) -> tuple[list[Json], list[str]]:
    """The rows of ``path``, and its damaged lines."""
    if not path.exists():
        return [], []
    rows, damaged = [], []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(without_crc32(line))
        except (ValueError, RecursionError) as error:
            logging.warning("line %d of %s is damaged (%s): it is left out", number, path, error)
            damaged.append(line.decode(errors="backslashreplace"))
    return rows, damaged


class Log:
    """The log of a training: rows of means over steps, pictures, and a text for the progress bar.

    Only process 0 writes files. A file that cannot be written does not end the training.

    Rows and pictures of steps after ``start``, the step from which a run resumes, are removed
    first: the resumed run repeats these steps, and the file must not list a step twice. But if the
    training begins again at step 0, they are stored under other names, because people may want
    them.

    Attributes:
      text: what the progress bar says about the last row.
      failures: the number of writes that failed.
    """

    def __init__(self, folder: epath.PathLike, start: int, images_per_step: float) -> None:
        self.text, self.failures, self._images_per_step = "", 0, images_per_step
        self._steps: list[tuple[float, float]] = []  # loss and grad_norm since the last row
        self._rows: list[Json] = []
        self._incomplete = False  # whether the file may lack numbers, or end in a part of a row
        self._writes = jax.process_index() == 0
        self._board: _Board | None = None
        self._folder = epath.Path(folder)
        if self._writes:
            self._begin(start)
        self._since = time.perf_counter()

    def _begin(self, start: int) -> None:
        """Set aside what is there of steps after ``start``, and open the files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        rows, damaged = _parse(self._folder / FILE)
        self._rows = [row for row in rows if row["step"] <= start]
        # The file is rewritten below, so its damaged lines are saved for people.
        aside = {f"{FILE}.damaged": [f"{line}\n" for line in damaged]}
        aside[EARLIER] = [] if start else [*map(json_line, rows)]
        for name, lines in aside.items():
            if lines:
                path = self._folder / name
                before = path.read_text() if path.exists() else ""
                write_whole(path, (before + "".join(lines)).encode())
        self._rewrite()
        for path in (self._folder / "samples").glob("step_*.png"):
            if not path.stem[5:].isdecimal() or int(path.stem[5:]) <= start:
                continue
            if start:
                path.unlink()
                continue
            earlier = path
            while earlier.exists():
                earlier = earlier.with_name(f"{earlier.name}.earlier")
            path.replace(earlier)
        where = str(self._folder / "tensorboard")
        # tensorboardX would treat the address of another store as the name of a local folder.
        if not remote(where) or where.startswith(("gs://", "s3://")):
            self._board = _Board(where, start + 1)
        else:
            logging.warning("tensorboard cannot write to %s: see %s", where, FILE)

    def add(self, loss: float, grad_norm: float) -> None:
        """Count one step."""
        self._steps.append((loss, grad_norm))

    def row(self, step: int) -> None:
        """Write the means of the steps since the last row, of which ``step`` is the last one."""
        now = time.perf_counter()
        (loss, norm), count = map(float, np.mean(self._steps, axis=0)), len(self._steps)
        self.text = f"loss {loss:z.4f}, the mean of {count} steps"
        seconds, before = now - self._since, self._rows[-1]["seconds"] if self._rows else 0.0
        rate = count * self._images_per_step / seconds
        values = {"loss": loss, "grad_norm": norm, "images_per_s": rate}
        values["seconds"] = before + seconds
        self._rows.append({"step": step, **values})
        self._write(step, values)
        self._steps, self._since = [], now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time is not a time of the training."""
        before = time.perf_counter()
        yield
        self._since += time.perf_counter() - before

    def validation(self, step: int, found: dict[str, float]) -> None:
        """Add the numbers of a validation to the last row, unless it is of another step or already
        has them."""
        if self.text:
            self.text += f", validation {found['validation_bits_per_dim']:z.4f} bits/dim"
        last = self._rows[-1] if self._rows else {}
        if last.get("step") == step and not found.keys() <= last.keys():
            last.update(found)
            self._incomplete = True
            self._write(step, found)

    def picture(self, step: int, grid: np.ndarray, png: bytes) -> None:
        """Write a picture of samples, uint8 ``(h, w, c)``, as a PNG file and to tensorboard."""
        if self._writes:
            with self._tolerant(step):
                (self._folder / "samples").mkdir(parents=True, exist_ok=True)
                write_whole(self._folder / "samples" / f"step_{step:08d}.png", png)
            with self._tolerant(step):
                if self._board:
                    self._board.write(step, {}, grid)

    def close(self) -> None:
        """Write what is buffered or was not written before."""
        with self._tolerant(self._rows[-1]["step"] if self._rows else 0):
            if self._writes and self._incomplete:
                self._rewrite()
            if self._board:
                self._board.close()

    @contextlib.contextmanager
    def _tolerant(self, step: int) -> Iterator[None]:
        """A context in which an OSError does not end the training. Only the first is logged."""
        try:
            yield
        except OSError as error:
            if not self.failures:
                logging.error("step %d: %s. Training goes on without this file", step, error)
            self.failures += 1

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Write the last row, whose new ``values`` these are, and those that failed before it."""
        if not self._writes:
            return
        with self._tolerant(step):
            if self._incomplete or remote(self._folder):  # Object stores cannot append.
                self._rewrite()
            else:
                self._incomplete = True  # The line may be cut off.
                with open(self._folder / FILE, "a") as file:
                    file.write(json_line(self._rows[-1]))
                self._incomplete = False
            if self._board:
                self._board.write(step, values)

    def _rewrite(self) -> None:
        self._incomplete = True
        write_whole(self._folder / FILE, "".join(map(json_line, self._rows)).encode())
        self._incomplete = False


class _Board:
    """Event files of TensorBoard in ``folder``, which the calling thread writes.

    tensorboardX's ``SummaryWriter`` writes in a thread of its own. A full disk ends this thread,
    and the program would then wait for it without end.

    TensorBoard drops what the files of earlier runs have for ``first_step`` and later steps. After
    a failed write the next write begins a new file, because the end of the old one may be lost.
    """

    flush_seconds = 120.0  # An object store receives the whole file each time.

    def __init__(self, folder: str, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._file: EventsWriter | None = None
        self._files, self._flushed = 0, -np.inf

    def write(self, step: int, values: dict[str, float], picture: np.ndarray | None = None) -> None:
        """Write the ``values`` and the ``picture`` of one step, uint8 ``(h, w, c)``. The message of
        an OSError names the folder."""
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import directory_check

        with self._errors():
            if self._file is None:
                directory_check(self._folder)
                self._file = EventsWriter(f"{self._folder}/events", f".{self._files}")
                if not self._files:  # In a later file this event would drop the steps of this run.
                    log = SessionLog(status=SessionLog.START)
                    first = Event(wall_time=time.time(), step=self._first_step, session_log=log)
                    self._file.write_event(first)
                self._files += 1
            summaries = [summary.scalar(*item) for item in values.items()]
            if picture is not None:
                summaries.append(summary.image("samples", picture, dataformats="HWC"))
            for each in summaries:
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=each))
            if time.monotonic() - self._flushed > self.flush_seconds:
                self._file.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Write what is buffered and close the file. The error is as for :meth:`write`."""
        if self._file is not None:
            with self._errors():
                self._file.close()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A context that raises every error as an OSError, because object stores raise errors of
        many types. After an error the present file gets no more events."""
        try:
            yield
        except Exception as error:
            self._file = None
            raise OSError(f"{self._folder} cannot be written: {error}") from error
