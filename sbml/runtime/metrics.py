"""Training metrics: ``metrics.jsonl`` for programs, tensorboardX for people; both append."""

import json
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sbml.runtime.files import stamped, unstamped, write_whole

FILE = "metrics.jsonl"


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, in order; none if there is no file.

    A damaged line is named and left out. A process killed while writing leaves at most one line
    without its end, the last, which is left out without a word.
    """
    return _parsed(epath.Path(workdir) / FILE)[0]


def _parsed(path: epath.Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of ``path``, and its damaged lines."""
    if not path.exists():
        return [], []
    rows, damaged = [], []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(unstamped(line))
        except (ValueError, RecursionError) as error:
            logging.warning("line %d of %s is damaged (%s): left out", number, path, error)
            damaged.append(line.decode(errors="backslashreplace"))
    return rows, damaged


def _line(row: dict[str, Any]) -> str:
    return json.dumps(stamped(row)) + "\n"


class MetricsWriter:
    """Appends scalars by step. Rows beyond ``start``, where a run resumes, are taken back first:
    the resumed run makes the same steps again, and a step must not stand twice.
    """

    def __init__(self, workdir: epath.PathLike, start: int) -> None:
        # Here, for it imports torch where there is one: seconds, for who only reads metrics.
        from tensorboardX import SummaryWriter

        self._path = epath.Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows, damaged = _parsed(self._path)
        if damaged:  # Kept beside, for people: the file is about to be written again.
            aside = self._path.parent / f"{FILE}.damaged"
            before = aside.read_text() if aside.exists() else ""
            aside.write_text(before + "\n".join(damaged) + "\n")
        self._rows = [row for row in rows if row["step"] <= start]
        self._rewrite()
        where = str(epath.Path(workdir) / "tensorboard")
        store, remote, _ = where.partition("://")
        # It would take another store's address for the name of a local folder.
        if not (known := not remote or store in ("gs", "s3")):
            logging.warning("tensorboard cannot write to %s: see %s", where, self._path)
        self._board = SummaryWriter(where, purge_step=start + 1, write_to_disk=known)

    @property
    def seconds(self) -> float:
        """Training time up to the last row."""
        return self._rows[-1]["seconds"] if self._rows else 0.0

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One row."""
        self._rows.append({"step": step, **values})
        if "://" in str(self._path):  # Object stores cannot append.
            self._rewrite()
        else:
            with open(self._path, "a") as file:
                file.write(_line(self._rows[-1]))
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(map(_line, self._rows)).encode())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image ``(h, w, c)`` of uint8, for tensorboard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        self._board.close()
