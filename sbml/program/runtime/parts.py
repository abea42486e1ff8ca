"""A table that is written to disk in parts, so that an interrupted computation can resume.

Each batch of rows is one ``.npz``, which is complete or absent. A later run reads the parts on disk
and computes only the missing rows; the finished table has the same bytes as without interruption.
:func:`compute_once` does the same for arrays that are computed once, and :class:`Resumable` for
the state of a computation that goes step by step.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.typing import ArrayLike

from sbml.core import fingerprint, streams
from sbml.core.files import DamagedFileError, intact_npz, read_json, read_npz, write_json, write_npz
from sbml.core.types import Json
from sbml.program.runtime import sharding, versions
from sbml.program.runtime.preemption import Preemption

STORED = "the images so far are stored"


def _digest(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]


def compute_once(
    root: epath.PathLike,
    name: str,
    compute: Callable[..., Mapping[str, ArrayLike]],
    *arguments: Any,
) -> dict[str, np.ndarray]:
    """The result of the first call of ``compute(*arguments)``, stored in a file of ``root`` under
    the fingerprint of the function, its arguments and the precision of matrix products.

    If the arrays were computed again on another machine, they could differ in their last digits,
    and a resumed run could not use the results that depend on the first arrays. All processes call
    this function, and therefore ``compute``, together.
    """
    identity = {
        "computed": fingerprint.of((compute, arguments)),
        "streams": streams.VERSION,
        "precision": jax.config.jax_default_matmul_precision,
    }
    path = epath.Path(root) / f"{name}_{_digest(identity)}.npz"
    sharding.barrier(f"{name} sought")
    if intact_npz(path) is None:
        arrays = compute(*arguments)
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(path, arrays)
    sharding.barrier(f"{name} made")
    return read_npz(path)


class Resumable:
    """The state of one long computation, arrays by name, in a file of ``root`` that is usually
    written at most every ten seconds; ``identity`` describes the computation in JSON values. If
    ``preemption`` asks it to stop, it does so after its state is written."""

    def __init__(
        self, root: epath.PathLike, name: str, identity: Json, preemption: Preemption
    ) -> None:
        self.path = epath.Path(root) / f"{name}_{_digest(identity)}.npz"
        self._written, self._preemption = time.monotonic(), preemption

    def load(self) -> dict[str, Any]:
        """The last state that was stored; {} if there is none."""
        return intact_npz(self.path) or {}

    def store(self, state: Mapping[str, ArrayLike]) -> None:
        """Store ``state`` if ten seconds have passed, or if it is time to stop."""
        if self._preemption.requested() or time.monotonic() - self._written > 10:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_npz(self.path, state)
            self._written = time.monotonic()
        self._preemption.leave_if_requested(STORED)

    def remove(self) -> None:
        """Remove the file of a computation that is finished."""
        self.path.unlink(missing_ok=True)


class Parts:
    """The parts of one table; ``identity`` describes its computation in plain JSON values.

    The parts lie in a folder of ``root`` whose name is a hash of ``identity``, so that different
    computations use different folders. ``identity.json`` in it is for people. A computation that
    ``preemption`` asks to stop does so after it has written a batch. Only process 0 writes.
    """

    def __init__(
        self, root: epath.PathLike, identity: Json, preemption: Preemption | None = None
    ) -> None:
        self._preemption = preemption or Preemption()
        self.directory = epath.Path(root) / _digest(identity)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._noted = False  # whether the present versions are stored
        write_json(self.directory / "identity.json", identity)

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Add the rows ``columns`` and note the versions of the packages. The columns ``sweep``
        and ``id`` identify a row."""
        if jax.process_index() == 0:
            if not self._noted:
                present = versions.versions()
                write_json(self.directory / f"versions_{_digest(present)}.json", present)
                self._noted = True
            first = f"{columns['sweep'][0]:04d}_{columns['id'][0]:08d}"
            write_npz(self.directory / f"part_{first}.npz", columns)
        self._preemption.leave_if_requested(STORED)

    def flush(self) -> None:
        """Wait until all processes can read the rows."""
        sharding.barrier("rows written")

    def other_versions(self) -> list[str]:
        """How the versions with which earlier commands wrote rows differ from the present ones: one
        text for each set of other versions. Damaged files are left out with a warning."""
        differences = []
        for path in sorted(self.directory.glob("versions_*.json")):
            try:
                noted = read_json(path, "the versions of some rows are unknown")
                differences.append("; ".join(versions.changes(noted, versions.versions())))
            except DamagedFileError as error:
                logging.warning("%s", error)
        return list(filter(None, dict.fromkeys(differences)))

    def read(self, sweep: int | None = None) -> dict[str, np.ndarray]:
        """The rows on disk, of ``sweep`` or of all sweeps, sorted by sweep and then by id; an empty
        dictionary if there are none.

        Damaged parts are left out with a warning that names them; their rows are computed again.
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
