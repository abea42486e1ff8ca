"""Checkpoints that are whole, or named as damaged.

Orbax writes a save into a temporary folder and renames the folder once every byte is there, so a
save killed half-way is never taken for a checkpoint. It does not notice bytes that change later.
Therefore each checkpoint has a *manifest* (``manifest.py``). Reading checks, in this order,

1. the manifest: unreadable means a damaged checkpoint;
2. its leaves against the template's: a difference means a checkpoint of another model;
3. the arrays against their CRC32s: a difference means a damaged checkpoint.

Damage leads to the checkpoint before it and a loud message, another model to an error. Neither
deletes anything.
"""

import contextlib
import dataclasses
import logging as stdlib_logging
import re
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.metadata import get_step_metadata
from orbax.checkpoint.path import step as step_lib

from sbml.runtime import disk, manifest
from sbml.runtime.manifest import DamagedCheckpointError, OtherModelError

PyTree = Any
Template = Callable[[dict[str, Any]], PyTree]  # of a checkpoint's metadata


class Restored(NamedTuple):
    """A checkpoint read back: its step, the state bit for bit, the metadata saved beside it.

    ``damaged`` says why newer ones were passed over.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]
    damaged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _FirstPastEach:
    """Preserves the first checkpoint at or past each multiple of ``interval`` steps."""

    interval: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Of ``checkpoints``, in ascending order."""
        passed = [c.step // self.interval for c in checkpoints]
        return [n > 0 and n not in passed[:i] for i, n in enumerate(passed)]


class UnsavedCheckpointError(OSError):
    """The newest state is in no checkpoint: the last attempt to save it failed."""


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>`` each. Use it as a context manager.

    Every process of a run makes the same calls in the same order. Reading writes nothing, so an
    evaluation may read while training saves.

    Args:
      directory: a folder that holds nothing else, local or any that etils understands
        (``gs://...``). The first save makes it and removes what killed saves have left in it.
      keep_last: how many of the newest to keep. With 1, damage to that one loses the run.
      keep_every: also keep, for ever, the first save at or past each multiple of this many steps.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep_last: int = 2, keep_every: int | None = None
    ) -> None:
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: give a number of at least 1")
        policies = ocp.training.preservation_policies
        every = [] if keep_every is None else [_FirstPastEach(keep_every)]
        self._kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), *every])
        directory = epath.Path(directory).expanduser()
        # An object store's path is absolute as it stands, and resolve() would garble it.
        self.directory = directory if directory.is_absolute() else directory.resolve()
        self._writer: ocp.training.Checkpointer | None = None
        self._saving: int | None = None  # the step whose save was begun last
        self._missed: str = ""  # why the last save came to nothing
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """The steps whose saves were completed, damaged ones included, in ascending order."""
        if not self.directory.exists():
            return []
        return sorted(d.step for d in step_lib.standard_name_format().find_all(self.directory))

    def metadata(self) -> dict[str, Any] | None:
        """The metadata saved with the newest checkpoint whose manifest is whole; None without one.

        Reads no array.
        """
        for step in reversed(self.steps()):
            try:
                found = get_step_metadata(self.directory / str(step)).custom_metadata
                return manifest.content(found, step)["metadata"]
            except Exception as error:  # Whatever the reader raises: it could not read the bytes.
                logging.error("Damaged checkpoint %s/%d: %s", self.directory, step, error)
        return None

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> bool:
        """Saves ``state`` in the background; it may be donated as soon as this returns.

        What blocks: an earlier save still under way, the copy to the host, and the CRC32s (a second
        or less for a gigabyte). A full disk must not end a training, for it may have room again:
        without room nothing is written, and what a failed save has written is removed. The first
        such save is logged as an error, the next ones try in silence, until one succeeds.
        :meth:`close` raises where the last one did not. A failure in the background is seen by the
        next ``save``, ``wait`` or ``close``; under several processes ``save`` raises it too.
        Checkpoints that ``restore`` found damaged first move to
        ``<directory>.damaged/<step>-<time>``: they no longer count as kept, and their steps can be
        saved again.

        Args:
          step: larger than every step already there, else ``ValueError``.
          state: any pytree of ``jax.Array``; under several processes, of global arrays.
          metadata: plain JSON values; tuples come back as lists.

        Returns:
          Whether there was room, so that the save was begun.
        """
        saved = manifest.create(step, state, metadata)
        self._after_earlier_save()
        self._set_damaged_aside()
        if (steps := self.steps()) and step <= steps[-1]:
            raise ValueError(
                f"step {step} is not beyond step {steps[-1]}, the newest checkpoint of "
                f"{self.directory}: is another process at work there? If not, take another "
                "directory, or move the newer ones away"
            )
        reason = disk.shortage(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        if multihost_utils.process_allgather(np.array(bool(reason))).any():
            self._miss(step, reason or "another process has no room")
            return False
        if self._writer is None:
            logging.get_absl_logger().addFilter(_not_of_orbax)
            self._writer = ocp.training.Checkpointer(
                self.directory, preservation_policy=self._kept, cleanup_tmp_directories=True
            )
        self._saving = step
        self._writer.save_async(step, state, force=True, custom_metadata=saved)
        return True

    def restore(self, template: PyTree | Template, step: int | None = None) -> Restored | None:
        """Reads a checkpoint back.

        Args:
          template: the state's pytree, of arrays or ``jax.ShapeDtypeStruct``; the state takes its
            shardings (this process's first device where a leaf has none). Or what gives it, all
            shardings included, of a checkpoint's metadata.
          step: which one; ``None`` for the newest whole one.

        Returns:
          The checkpoint, or ``None`` if ``step`` is ``None`` and there is no checkpoint.

        Raises:
          ValueError: there is no such step.
          OtherModelError: it is a ``ValueError``, and names the first leaf that differs.
          DamagedCheckpointError: ``step``, or every checkpoint there is, is damaged.
        """
        self.wait()
        steps = self.steps()
        if step is not None and step not in steps:
            raise ValueError(f"no step {step} in {self.directory}: choose one of {steps}")
        fixed = None if callable(template) else jax.tree.map(_abstract, template)
        reasons: list[str] = []
        for candidate in reversed(steps) if step is None else [step]:
            restored, damage = self._read(candidate, template if fixed is None else fixed)
            if restored is not None:
                return restored._replace(damaged=tuple(reasons))
            reasons.append(f"step {candidate}: {damage}")
            logging.error("Damaged checkpoint in %s, %s", self.directory, reasons[-1])
            if step is None:
                self._damaged.add(candidate)
        if not reasons:
            return None
        raise DamagedCheckpointError(
            "\n  ".join([f"no whole checkpoint in {self.directory} to restore:", *reasons])
            + "\nNothing was deleted. Put a copy back, choose another step or directory, or move "
            "the directory away to start anew."
        )

    def _after_earlier_save(self) -> None:
        """Wait for it; if it failed, say so."""
        step = self._saving
        try:
            self.wait()
        except Exception as error:  # Whatever stopped the writer, this state may be saved.
            if jax.process_count() > 1 or step is None:
                raise
            # Without the names of Orbax's temporary files, which are long and gone.
            self._miss(step, textwrap.shorten(re.sub('"[^"]*": ', "", str(error)), 200))

    def _miss(self, step: int, reason: str) -> None:
        """Note that there is no checkpoint of ``step``; say so if there was one of the last."""
        if not self._missed:
            logging.error(
                "The checkpoint of step %d was not saved in %s: %s. Training goes on, and later "
                "checkpoints are saved once there is room",
                *(step, self.directory, reason),
            )
        self._missed = f"no checkpoint of step {step} could be saved in {self.directory}: {reason}"

    def wait(self) -> None:
        """Blocks until the save under way, if any, is on disk; raises if it failed."""
        if self._writer is None:
            return
        step, self._saving = self._saving, None
        try:
            self._writer.wait()
        except BaseException:
            self._drop_writer()
            raise
        if step is not None and self._missed:
            logging.warning("There is room again: step %d is saved in %s", step, self.directory)
            self._missed = ""
            self._remove_partial()  # Late writes of the saves that failed end after their removal.

    def _drop_writer(self) -> None:
        """Forget a writer whose save failed, and remove what it has written of it.

        Orbax's own threads and locks are in no state to save again.
        """
        writer, self._writer = self._writer, None
        with contextlib.suppress(Exception):  # It raises the failure once more.
            if writer is not None:
                writer.close()
        self._remove_partial()

    def _remove_partial(self) -> None:
        if jax.process_index() == 0:
            disk.remove_partial(self.directory, "*.orbax-checkpoint-tmp*")

    def close(self) -> None:
        """Waits, then frees what saving holds.

        Raises:
          UnsavedCheckpointError: the last save came to nothing.
        """
        self._after_earlier_save()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        missed, self._missed = self._missed, ""
        if missed:
            self._remove_partial()  # Writes that were still under way have come back by now.
            steps = self.steps()
            last = f"from the newest checkpoint, step {steps[-1]}" if steps else "from the start"
            raise UnsavedCheckpointError(
                f"{missed}. Make room and run the same command again: it goes on {last}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, step: int, template: PyTree | Template) -> tuple[Restored | None, str]:
        """The checkpoint, or ``None`` and its damage: the same verdict on every process."""
        path = self.directory / str(step)
        restored, damage = None, "another process could not read it"
        try:
            stored = manifest.content(get_step_metadata(path).custom_metadata, step)
            wanted = template(stored["metadata"]) if callable(template) else template
            manifest.check_same_model(path, stored["leaves"], manifest.leaves_of(wanted))
            state = ocp.load(path, wanted, checkpointable_name="state")
            manifest.check_crc32s(stored, state)
            restored = Restored(step, state, stored["metadata"])
        except (OtherModelError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # These say nothing about the checkpoint's bytes.
        except Exception as error:  # Whatever else the reader raises, it could not read them.
            damage = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        if multihost_utils.process_allgather(np.array(restored is None)).any():
            restored = None
        return restored, damage

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
        if jax.process_index() == 0:
            aside = self.directory.parent / f"{self.directory.name}.damaged"
            aside.mkdir(parents=True, exist_ok=True)
            if "://" in str(aside):  # There a folder exists only while something lies in it.
                (aside / "about.txt").write_text("Checkpoints that were found damaged.\n")
            for step in sorted(self._damaged):
                target = aside / f"{step}-{time.time_ns()}"
                (self.directory / str(step)).rename(target)
                logging.warning("Moved the damaged checkpoint of step %d to %s", step, target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._damaged.clear()


def _not_of_orbax(record: stdlib_logging.LogRecord) -> bool:
    """False for Orbax's errors: each is raised as well, and told of here in one line."""
    return record.levelno < stdlib_logging.ERROR or "orbax" not in record.pathname


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding.shard_shape(leaf.shape)  # A sharding that does not fit must not pass for damage.
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
