"""A table that survives being killed: written in parts, each whole or not there.

One ``.npz`` a batch, renamed into place when complete. A later run reads what is there, makes only
the rows that are missing, and the finished table is the same bytes as without interruption.
:func:`kept` does the same for arrays that are made once.
"""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from sbml.runtime import sharding
from sbml.runtime.files import (
    DamagedFileError,
    intact_npz,
    read_json,
    read_npz,
    write_json,
    write_npz,
)


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
    if intact_npz(path) is None:
        made = make()
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, made)
    sharding.barrier(f"{name} made")
    return read_npz(path)


class Parts:
    """The parts of one table, of the computation that ``identity`` describes in plain JSON values.

    They lie in a folder of ``root`` named by ``identity``, so another computation has another.

    Raises:
      ValueError: if the folder says that it is another computation's.
    """

    def __init__(self, root: epath.PathLike, identity: dict[str, Any]) -> None:
        self.directory = epath.Path(root) / _digest(identity)
        self.directory.mkdir(parents=True, exist_ok=True)
        marker = self.directory / "identity.json"
        known = None
        if marker.exists():
            try:
                known = read_json(marker, "it is written again")
            except DamagedFileError as error:
                logging.warning("%s", error)
        if known is None:
            write_json(marker, identity)
        elif known != json.loads(json.dumps(identity)):
            raise ValueError(f"{self.directory} belongs to another computation: move it away")

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
        of_sweep = "" if sweep is None else f"{sweep:04d}_"
        paths = sorted(self.directory.glob(f"part_{of_sweep}*.npz"))
        tables = [table for path in paths if (table := intact_npz(path)) is not None]
        if not tables:
            return {}
        table = {k: np.concatenate([t[k] for t in tables]) for k in tables[0]}
        order = np.lexsort((table["id"], table["sweep"]))
        table = {k: v[order] for k, v in table.items()}
        rows = np.stack([table["sweep"], table["id"]])
        if np.any(np.all(rows[:, 1:] == rows[:, :-1], axis=0)):
            raise ValueError(f"{self.directory} holds an image twice: remove it and run again")
        return table
