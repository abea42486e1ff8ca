"""Training metrics by step: ``metrics.jsonl`` for programs, tensorboard for people."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from absl import logging
from etils import epath

from sbml.runtime.files import json_line, remote, without_crc32, write_whole
from sbml.types import Json

if TYPE_CHECKING:
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.summary_pb2 import Summary

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


class MetricsWriter:
    """Appends rows of scalars. A file that cannot be written does not end the training.

    Rows of steps after ``start``, the step from which a run resumes, are removed first: the resumed
    run repeats these steps, and the file must not list a step twice.
    """

    def __init__(self, workdir: epath.PathLike, start: int) -> None:
        self.failures = 0  # number of writes that failed
        self._path = epath.Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows, damaged = _parse(self._path)
        if damaged:  # The file is rewritten below, so its damaged lines are saved for people.
            aside = self._path.parent / f"{FILE}.damaged"
            before = aside.read_text() if aside.exists() else ""
            aside.write_text(before + "\n".join(damaged) + "\n")
        if rows and start == 0:
            earlier = self._path.parent / EARLIER
            before = earlier.read_bytes() if earlier.exists() else b""
            write_whole(earlier, before + "".join(map(json_line, rows)).encode())
        self._rows = [row for row in rows if row["step"] <= start]
        self._incomplete = False  # whether the file may lack rows, or end in a part of one
        self._rewrite()
        where = str(epath.Path(workdir) / "tensorboard")
        self._board = None
        # tensorboardX would treat the address of another store as the name of a local folder.
        if not remote(where) or where.startswith(("gs://", "s3://")):
            self._board = _Board(where, start + 1)
        else:
            logging.warning("tensorboard cannot write to %s: see %s", where, self._path)

    @property
    def seconds(self) -> float:
        """Training time in seconds up to the last row."""
        return self._rows[-1]["seconds"] if self._rows else 0.0

    @contextlib.contextmanager
    def tolerant(self, step: int) -> Iterator[None]:
        """A context in which an OSError does not end the training. Only the first is logged."""
        try:
            yield
        except OSError as error:
            if not self.failures:
                logging.error("step %d: %s. Training goes on without this file", step, error)
            self.failures += 1

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append the row of one step. Rows that could not be written before are written with it."""
        from tensorboardX import summary

        self._rows.append({"step": step, **values})
        with self.tolerant(step):
            if self._incomplete or remote(self._path):  # Object stores cannot append.
                self._rewrite()
            else:
                self._incomplete = True  # The line may be cut off.
                with open(self._path, "a") as file:
                    file.write(json_line(self._rows[-1]))
                self._incomplete = False
            if self._board:
                self._board.write(step, *(summary.scalar(*item) for item in values.items()))

    def amend(self, step: int, values: dict[str, float]) -> None:
        """Add ``values`` to the last row, if it is that of ``step`` and lacks them."""
        from tensorboardX import summary

        last = self._rows[-1] if self._rows else {}
        if last.get("step") != step or values.keys() <= last.keys():
            return
        last.update(values)
        with self.tolerant(step):
            self._rewrite()
            if self._board:
                self._board.write(step, *(summary.scalar(*item) for item in values.items()))

    def _rewrite(self) -> None:
        self._incomplete = True
        write_whole(self._path, "".join(map(json_line, self._rows)).encode())
        self._incomplete = False

    def picture(self, step: int, image: np.ndarray) -> None:
        """Write a picture of samples, uint8 ``(h, w, c)``, to tensorboard."""
        from tensorboardX import summary

        if self._board:
            with self.tolerant(step):
                self._board.write(step, summary.image("samples", image, dataformats="HWC"))

    def close(self) -> None:
        """Write what is buffered or was not written before."""
        with self.tolerant(self._rows[-1]["step"] if self._rows else 0):
            if self._incomplete:
                self._rewrite()
            if self._board:
                self._board.close()


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

    def write(self, step: int, *summaries: "Summary") -> None:
        """Write the summaries of one step. The message of an OSError names the folder."""
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
            for summary in summaries:
                self._file.write_event(Event(wall_time=time.time(), step=step, summary=summary))
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
