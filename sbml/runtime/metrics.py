"""Training metrics by step: ``metrics.jsonl`` for programs, tensorboard for people."""

import json
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sbml.runtime.files import with_crc32, without_crc32, write_whole
from sbml.runtime.tensorboard import Board

FILE = "metrics.jsonl"
EARLIER = "metrics.jsonl.earlier"  # rows of a training that was begun again at step 0


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, in order; an empty list if there is no file.

    A damaged line is left out with a warning that names it. A process that is killed while writing
    leaves at most one incomplete line, the last one; this line is left out without a warning.
    """
    return _parse(epath.Path(workdir) / FILE)[0]


def _parse(path: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
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


def _line(row: dict[str, Any]) -> str:
    return json.dumps(with_crc32(row)) + "\n"


class MetricsWriter:
    """Appends rows of scalars.

    Rows of steps after ``start``, the step from which a run resumes, are removed first: the resumed
    run repeats these steps, and the file must not list a step twice.
    """

    def __init__(self, workdir: epath.PathLike, start: int) -> None:
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
            write_whole(earlier, before + "".join(map(_line, rows)).encode())
        self._rows = [row for row in rows if row["step"] <= start]
        self._incomplete = False  # whether the file may lack rows, or end in a part of one
        self._rewrite()
        where = str(epath.Path(workdir) / "tensorboard")
        store, remote, _ = where.partition("://")
        # tensorboardX would treat the address of another store as the name of a local folder.
        self._board: Board | None = None
        if not remote or store in ("gs", "s3"):
            self._board = Board(where, start + 1)
        else:
            logging.warning("tensorboard cannot write to %s: see %s", where, self._path)

    @property
    def seconds(self) -> float:
        """Training time in seconds up to the last row."""
        return self._rows[-1]["seconds"] if self._rows else 0.0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Append the row of one step. Rows that could not be written before are written with it.

        Raises:
          OSError: a file could not be written.
        """
        self._rows.append({"step": step, **values})
        if self._incomplete or "://" in str(self._path):  # Object stores cannot append.
            self._rewrite()
        else:
            self._incomplete = True  # The line may be cut off.
            with open(self._path, "a") as file:
                file.write(_line(self._rows[-1]))
            self._incomplete = False
        if self._board:
            self._board.scalars(step, values)

    def _rewrite(self) -> None:
        self._incomplete = True
        write_whole(self._path, "".join(map(_line, self._rows)).encode())
        self._incomplete = False

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write an image ``(h, w, c)`` of uint8 to tensorboard; raises OSError if this fails."""
        if self._board:
            self._board.image(step, name, image)

    def close(self) -> None:
        """Write what is buffered or was not written before; raises OSError if this fails."""
        if self._incomplete:
            self._rewrite()
        if self._board:
            self._board.close()
