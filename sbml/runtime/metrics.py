"""Training metrics: ``metrics.jsonl`` for programs, tensorboardX for people; both append."""

import json
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from sbml.runtime.files import write_whole

FILE = "metrics.jsonl"


def read(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``, in order; none if there is no file.

    A process killed while writing leaves at most one partial line, the last: it is left out.
    """
    path = epath.Path(workdir) / FILE
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class MetricsWriter:
    """Appends scalars by step. Rows beyond ``start``, where a run resumes, are taken back first:
    the resumed run makes the same steps again, and a step must not stand twice.
    """

    def __init__(self, workdir: epath.PathLike, start: int) -> None:
        # Here, for it imports torch where there is one: seconds, for who only reads metrics.
        from tensorboardX import SummaryWriter

        self._path = epath.Path(workdir) / FILE
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = [row for row in read(workdir) if row["step"] <= start]
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
                file.write(json.dumps(self._rows[-1]) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def _rewrite(self) -> None:
        write_whole(self._path, "".join(json.dumps(r) + "\n" for r in self._rows).encode())

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """An image ``(h, w, c)`` of uint8, for tensorboard."""
        self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        self._board.close()
