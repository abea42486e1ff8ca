"""Event files of TensorBoard, which the calling thread writes.

tensorboardX writes such files in a thread of its own. A full disk ends this thread, and the program
would then wait for it without end.
"""

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import numpy as np


class Board:
    """Writes scalars and images of training steps into event files of one folder.

    TensorBoard drops what the files of earlier runs have for ``first_step`` and later steps. After
    a failed write the next write begins a new file, because the end of the old one may be lost.
    """

    flush_seconds = 120.0  # An object store receives the whole file each time.

    def __init__(self, folder: str, first_step: int) -> None:
        self._folder, self._first_step = folder, first_step
        self._file: Any = None
        self._files, self._flushed = 0, -np.inf

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Write the scalars of one step.

        Raises:
          OSError: a write failed. The message names the folder.
        """
        from tensorboardX import summary

        for name, value in values.items():
            self._write(step=step, summary=summary.scalar(name, value))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image ``(h, w, c)`` of uint8. The error is as for :meth:`scalars`."""
        from tensorboardX import summary

        self._write(step=step, summary=summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        """Write what is buffered and close the file. The error is as for :meth:`scalars`."""
        file, self._file = self._file, None
        if file is not None:
            with self._errors():
                file.flush()
                file.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        try:
            with self._errors():
                self._file = self._file or self._open()
                self._file.write(Event(wall_time=time.time(), **fields).SerializeToString())
                if time.monotonic() - self._flushed > self.flush_seconds:
                    self._file.flush()
                    self._flushed = time.monotonic()
        except OSError:
            file, self._file = self._file, None
            with contextlib.suppress(Exception):  # Closing raises the same error once more.
                file.close()
            raise

    def _open(self) -> Any:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter, directory_check

        directory_check(self._folder)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{self._files}"
        file = RecordWriter(f"{self._folder}/{name}")
        start: list[dict[str, Any]] = [{"file_version": "brain.Event:2"}]
        if not self._files:  # In a later file this event would drop the steps of this run.
            log = SessionLog(status=SessionLog.START)
            start.append({"step": self._first_step, "session_log": log})
        for fields in start:
            file.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._files += 1
        return file

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """A context in which every error becomes an OSError: object stores raise others."""
        try:
            yield
        except Exception as error:
            raise OSError(f"{self._folder} cannot be written: {error}") from error
