"""A table that survives being killed: written in parts, each whole or not there.

One ``.npz`` a batch, renamed into place when complete. A later run reads what is there, makes only
the rows that are missing, and the finished table is the same bytes as without interruption.
:func:`kept` does the same for arrays that are made once.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from sbml.runtime import sharding
from sbml.runtime.files import write_whole

# What reading a file that is not a whole ``.npz`` raises.
DAMAGE = (ValueError, OSError, zipfile.BadZipFile)


def write_npz(path: epath.Path, columns: dict[str, np.ndarray]) -> None:
    """Write atomically; the same columns give the same bytes (numpy stores no time stamp)."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    write_whole(path, buffer.getvalue())


def read_npz(path: epath.PathLike) -> dict[str, np.ndarray]:
    """The columns of a file that :func:`write_npz` wrote."""
    with np.load(io.BytesIO(epath.Path(path).read_bytes())) as file:
        return {name: file[name] for name in file.files}


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def kept(
    root: epath.PathLike, name: str, identity: dict[str, Any], make: Callable[[], Any]
) -> dict[str, np.ndarray]:
    """The arrays that ``make`` gave when they were first asked for, from a file of ``root``.

    Made anew on another machine they could differ in their last digits, and all that was computed
    with them would be of no use to a resumed run. All processes call it, and make, together.
    """
    path = epath.Path(root) / f"{name}_{_digest(identity)}.npz"
    sharding.barrier(f"{name} sought")
    try:
        found = read_npz(path) if path.exists() else None
    except DAMAGE as error:
        logging.warning("%s is damaged (%s): it is made again", path, error)
        found = None
    if found is None:
        made = make()
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, made)
    sharding.barrier(f"{name} made")
    return read_npz(path)


class Parts:
    """The parts of one table, in ``directory``, for the computation that ``identity`` describes.

    Raises:
      ValueError: if the directory holds parts of another computation.
    """

    def __init__(self, directory: epath.PathLike, identity: dict[str, Any]) -> None:
        self.directory = epath.Path(directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        marker, text = self.directory / "identity.json", json.dumps(identity, indent=1)
        if not marker.exists():
            write_whole(marker, text.encode())
        elif marker.read_text() != text:
            raise ValueError(f"{self.directory} belongs to another computation: move it away")

    @classmethod
    def addressed(cls, root: epath.PathLike, identity: dict[str, Any]) -> "Parts":
        """In a folder of ``root`` named by ``identity``: another computation has another."""
        return cls(epath.Path(root) / _digest(identity), identity)

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Add rows; the columns ``sweep`` and ``id`` name them."""
        first = f"{columns['sweep'][0]:04d}_{columns['id'][0]:08d}"
        write_npz(self.directory / f"part_{first}.npz", columns)

    def read(self, sweep: int | None = None) -> dict[str, np.ndarray]:
        """The rows so far, of ``sweep`` or all, by sweep, then id; empty if none.

        Damaged parts are named and redone.

        Raises:
          ValueError: if a row stands twice, as after two runs at once.
        """
        tables = []
        of_sweep = "" if sweep is None else f"{sweep:04d}_"
        for path in sorted(self.directory.glob(f"part_{of_sweep}*.npz")):
            try:
                tables.append(read_npz(path))
            except DAMAGE as error:
                logging.warning("%s is damaged (%s): its images are made again", path, error)
        if not tables:
            return {}
        table = {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}
        order = np.lexsort((table["id"], table["sweep"]))
        table = {k: v[order] for k, v in table.items()}
        rows = np.stack([table["sweep"], table["id"]])
        if np.any(np.all(rows[:, 1:] == rows[:, :-1], axis=0)):
            raise ValueError(f"{self.directory} holds an image twice: remove it and run again")
        return table
