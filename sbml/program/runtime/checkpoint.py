"""Checkpoints that are written completely or not at all, with checksums that reveal damage.

Orbax writes a checkpoint into a temporary folder and renames the folder when it is complete. So an
interrupted save is never taken for a checkpoint. But Orbax does not notice bytes that change later.
Therefore each checkpoint has a *manifest*, which Orbax stores as its metadata: format, step, path,
shape, dtype and CRC32 of every leaf of the state, the user's metadata, and a CRC32 of all that.
Reading a checkpoint checks

1. whether the manifest can be read; if not, the checkpoint is damaged;
2. whether its leaves are those of the template; if not, the checkpoint is of another model;
3. whether the arrays have the CRC32s of the manifest; if not, the checkpoint is damaged.

If a checkpoint is damaged, an error is logged and the checkpoint before it is read. If it is of
another model, an error is raised. Nothing is deleted in either case.
"""

import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import logging as stdlib_logging
import re
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Self

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from jax.tree_util import keystr, tree_leaves_with_path
from orbax.checkpoint import v1 as ocp
from orbax.checkpoint.metadata import get_step_metadata
from orbax.checkpoint.path import step as step_lib

from sbml.core.files import CRC32, remote, with_crc32
from sbml.core.types import Json, PyTree
from sbml.program.runtime.peers import LostProcessError
from sbml.program.runtime.trees import leaf_crc32

Template = Callable[[Json], PyTree]
FORMAT = 1  # the number of the form that checkpoints and their metadata have
OVERHEAD = 2**20  # bytes for the names, shapes and checksums of a checkpoint's arrays


class DamagedCheckpointError(RuntimeError):
    """A checkpoint whose bytes have changed since it was saved."""


class OtherModelError(ValueError):
    """A checkpoint that is not of the model, or not of the format, that is read."""


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
      step: its step.
      state: the state, equal to the saved one bit for bit.
      metadata: the metadata that was saved with it.
      damaged: for each newer checkpoint, the reason why it could not be read.
    """

    step: int
    state: PyTree
    metadata: Json
    damaged: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class _FirstPastEach:
    """Keeps the first checkpoint at or after each multiple of ``interval`` steps. Orbax's own rule,
    EveryNSteps, keeps none if no checkpoint is at a multiple, or also the first one of the run."""

    interval: int

    def should_preserve(
        self, checkpoints: Sequence[ocp.training.CheckpointMetadata], *, context: object
    ) -> Sequence[bool]:
        """Whether to keep each of ``checkpoints``, which are in ascending order."""
        passed = [c.step // self.interval for c in checkpoints]
        return [n > 0 and n not in passed[:i] for i, n in enumerate(passed)]


class UnsavedCheckpointError(OSError):
    """The last attempt to save a checkpoint failed, so the newest state is not saved."""


class Checkpoints:
    """The checkpoints of one run, ``<directory>/<step>`` each. Use it as a context manager.

    Every process of a run makes the same calls in the same order. Reading writes nothing, so an
    evaluation may read while training saves.

    A full disk does not end a training, because space may become free again, and neither does a
    folder that cannot be written for a while. Only the first save must be able to begin. If there
    is no space, nothing is written; if a save fails, its files are removed. The first failure is
    logged as an error, and later ones are not logged until a save succeeds. :meth:`close` raises an
    error if the last save failed.

    Args:
      directory: a folder for the checkpoints only, local or any that etils understands
        (``gs://...``). The first save creates it and removes the parts of interrupted saves.
      keep_last: the number of newest checkpoints to keep. With 1, the run is lost if this one is
        damaged.
      keep_every: also keep, permanently, the first checkpoint at or after each multiple of this
        number of steps; None to keep no others.
    """

    def __init__(
        self, directory: epath.PathLike, *, keep_last: int = 2, keep_every: int | None = None
    ) -> None:
        policies = ocp.training.preservation_policies
        every = [] if keep_every is None else [_FirstPastEach(keep_every)]
        self._kept = policies.AnyPreservationPolicy([policies.LatestN(keep_last), *every])
        directory = epath.Path(directory).expanduser()
        # The path of an object store is already absolute, and resolve() would make it invalid.
        self.directory = directory if directory.is_absolute() else directory.resolve()
        self._writer: ocp.training.Checkpointer | None = None
        self._saving: tuple[int, ocp.AsyncResponse[bool]] | None = None  # step and response
        self._missed: tuple[int, str] | None = None  # a last save that failed: its step, why
        self._tried = False  # whether a save has begun, or will be tried again
        self._damaged: set[int] = set()

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, also damaged ones, in ascending order."""
        if not self.directory.exists():
            return []
        return sorted(d.step for d in step_lib.standard_name_format().find_all(self.directory))

    def newest(self) -> str:
        """The newest complete checkpoint in words, for messages about where a run continues."""
        steps = self.steps()
        return f"the newest checkpoint, {self.directory / str(steps[-1])}" if steps else "the start"

    def metadata(self) -> Json | None:
        """The metadata of the newest checkpoint with an undamaged manifest; None if there is none.

        No array is read.
        """
        for step in reversed(self.steps()):
            try:
                return _manifest(self.directory / str(step))["metadata"]
            except OtherModelError:
                raise
            except Exception as error:  # Any other error: the bytes could not be read.
                if step not in self.steps():
                    return self.metadata()
                logging.error("Damaged checkpoint %s/%d: %s", self.directory, step, error)
        return None

    def save(self, step: int, state: PyTree, metadata: Json) -> bool:
        """Save ``state`` in the background. Its arrays may be donated as soon as this returns.

        The call waits for an earlier save, for the copy to the host and for the CRC32s (a second or
        less for a gigabyte). If the save fails later, in the background, the next call tells it:
        ``wait`` raises the error. In a single process ``save`` logs it, and ``close`` raises an
        UnsavedCheckpointError; with several processes, both raise the error itself.

        Checkpoints that ``restore`` found to be damaged are first moved to
        ``<directory>.damaged/<step>-<time>``. They then do not count as kept, and their steps can
        be saved again.

        Args:
          step: the step, larger than that of every checkpoint.
          state: any pytree of ``jax.Array``; with several processes, of global arrays.
          metadata: plain JSON values; tuples are read back as lists.

        Returns:
          Whether the save began.

        Raises:
          ValueError: ``step`` is not larger than the newest one.
          UnsavedCheckpointError: the first save cannot begin, although the disk is not full.
        """
        crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
        body = {"format": FORMAT, "step": step, "leaves": _leaves(state), "crc32s": crc32s}
        body["metadata"] = metadata
        body = json.loads(json.dumps(body, allow_nan=False))
        content = {"manifest": body, CRC32: with_crc32(body)[CRC32]}
        self._end_save()
        self._set_damaged_aside()
        if (steps := self.steps()) and step <= steps[-1]:
            raise ValueError(
                f"step {step} is not beyond step {steps[-1]}, the newest checkpoint of "
                f"{self.directory}: is another process at work there? If not, take another "
                "directory, or move the newer ones away"
            )
        reason = shortage(self.directory, sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        if multihost_utils.process_allgather(np.array(bool(reason))).any():
            self._miss(step, reason or "another process has no room")
            return False
        try:
            # If Orbax cannot make a folder in the background, a thread of it waits for minutes.
            if not remote(self.directory):
                self.directory.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=self.directory).close()
            if self._writer is None:
                logging.get_absl_logger().addFilter(_not_of_orbax)
                _leave_out_late_writes()
                self._writer = ocp.training.Checkpointer(
                    self.directory, preservation_policy=self._kept, cleanup_tmp_directories=True
                )
            response = self._writer.save_async(step, state, force=True, custom_metadata=content)
        except Exception as error:
            self._drop_writer()
            if jax.process_count() > 1 or not isinstance(error, OSError):
                raise
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)  # no bytes or inodes; a quota
            if not full and not self._tried:
                self._missed = step, str(error)
                raise self._unsaved() from error
            self._miss(step, str(error))
            return False
        assert response is not None  # It is None only if a policy of Orbax skips this step.
        self._saving, self._tried = (step, response), True
        return True

    def restore(self, template: Template) -> Restored | None:
        """Read the newest undamaged checkpoint.

        Args:
          template: a function from the checkpoint's metadata to a pytree like the state, of
            ``jax.ShapeDtypeStruct`` with shardings.

        Returns:
          The checkpoint, or None if there is none.

        Raises:
          OtherModelError: the checkpoint is of another model. This is a ``ValueError``, and names
            the first leaf that differs.
          DamagedCheckpointError: all checkpoints are damaged.
        """
        self.wait()
        reasons: list[str] = []
        for step in reversed(self.steps()):
            restored, damage = self._read(step, template)
            if restored is not None:
                return restored._replace(damaged=tuple(reasons))
            # A training that goes on may have deleted it. All processes agree on it.
            if multihost_utils.process_allgather(np.array(step not in self.steps())).any():
                return self.restore(template)
            reasons.append(f"step {step}: {damage}")
            logging.error("Damaged checkpoint in %s, %s", self.directory, reasons[-1])
            self._damaged.add(step)
        if not reasons:
            return None
        raise DamagedCheckpointError(
            "\n  ".join([f"no whole checkpoint in {self.directory} to restore:", *reasons])
            + "\nNothing was deleted. Put a copy back, choose another directory, or move the "
            "directory away to start again."
        )

    def require(self, template: Template, missing: str) -> Restored:
        """What :meth:`restore` reads; without a checkpoint, a ValueError with the text ``missing``,
        in which {} stands for the directory."""
        if (restored := self.restore(template)) is None:
            raise ValueError(missing.format(self.directory))
        return restored

    def each(self, template: Template) -> Iterator[Restored]:
        """All undamaged checkpoints by their steps; ``template`` as for :meth:`restore`."""
        self.wait()
        for step in self.steps():
            restored, damage = self._read(step, template)
            if restored is None:
                logging.error("Damaged checkpoint in %s, step %d: %s", self.directory, step, damage)
            else:
                yield restored

    def _read(self, step: int, template: Template) -> tuple[Restored | None, str]:
        """The checkpoint, or None and a description of its damage.

        All processes agree on which of the two it is.
        """
        path = self.directory / str(step)
        restored, damage = None, "another process could not read it"
        try:
            stored = _manifest(path)
            like = template(stored["metadata"])
            for leaf, of_model in itertools.zip_longest(stored["leaves"], _leaves(like)):
                if leaf != of_model:
                    raise OtherModelError(
                        f"{path} is of another model. First difference: it holds {_text(leaf)}, "
                        f"this model has {_text(of_model)}. Use its configuration, or a new folder"
                    )
            state = ocp.load(path, like, checkpointable_name="state")
            # All are computed before the comparison: all processes must take part in gathering.
            crc32s = [leaf_crc32(leaf) for leaf in jax.tree.leaves(state)]
            for leaf, saved, crc32 in zip(stored["leaves"], stored["crc32s"], crc32s, strict=True):
                if crc32 != saved:
                    raise DamagedCheckpointError(f"{_text(leaf)} fails its CRC32")
            restored = Restored(step, state, stored["metadata"])
        except (OtherModelError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # These say nothing about the checkpoint's bytes.
        except Exception as error:  # Any other error means that the bytes could not be read.
            damage = textwrap.shorten(f"{type(error).__name__}: {error}", 400)
        if multihost_utils.process_allgather(np.array(restored is None)).any():
            restored = None
        return restored, damage

    def wait(self) -> None:
        """Wait until a save in the background is on disk; its error is raised if it failed."""
        if self._saving is None:
            return
        (step, response), self._saving = self._saving, None
        try:
            response.result()  # This also ends the thread of the response, and closes its files.
        except BaseException:
            self._drop_writer()
            raise
        if self._missed:
            logging.warning("Saving works again: step %d is saved in %s", step, self.directory)
            self._missed = None
            # Writes of failed saves may have ended only after their files were removed.
            self._remove_partial()

    def close(self) -> None:
        """Wait for the last save, and close the writer.

        Raises:
          UnsavedCheckpointError: the last save failed.
        """
        self._end_save()
        self._close_writer()
        if self._missed:
            raise self._unsaved()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is LostProcessError:  # A save in progress would wait for the lost process.
            return
        try:
            self.close()
        except UnsavedCheckpointError as error:
            if kind is None:
                raise
            logging.error("%s", error)  # The error that ended the training is the one to raise.

    def _end_save(self) -> None:
        """Wait for the save in progress; if it failed, log that."""
        step = self._saving[0] if self._saving else 0
        try:
            self.wait()
        except Exception as error:  # After any error of the writer, the next state may be saved.
            if jax.process_count() > 1:
                raise
            # The names of Orbax's temporary files are left out: these files do not exist any more.
            self._miss(step, textwrap.shorten(re.sub('"[^"]*": ', "", str(error)), 200))

    def _miss(self, step: int, reason: str) -> None:
        """Record that ``step`` was not saved; log an error unless the save before it failed too."""
        if not self._missed:
            logging.error(
                f"The checkpoint of step {step} was not saved in {self.directory}: {reason}. "
                "Training goes on, and tries again to save at each later checkpoint"
            )
        self._missed, self._tried = (step, reason), True

    def _unsaved(self) -> UnsavedCheckpointError:
        """The error of a run that ends after a save that failed; :meth:`close` raises no second
        one."""
        assert self._missed
        (step, reason), self._missed = self._missed, None
        self._remove_partial()  # Writes that were still in progress have ended by now.
        return UnsavedCheckpointError(
            f"no checkpoint of step {step} could be saved in {self.directory}: {reason}. Remove "
            f"the cause and run the same command again: it goes on from {self.newest()}"
        )

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _drop_writer(self) -> None:
        """Discard a writer whose save failed, and remove the files of this save.

        Orbax's threads and locks are then in a state in which it cannot save again.
        """
        with contextlib.suppress(Exception):  # Closing raises the same error once more.
            self._close_writer()
        self._remove_partial()

    def _remove_partial(self) -> None:
        """Remove the files of failed saves. In an object store, the next writer does this."""
        if jax.process_index() == 0 and not remote(self.directory):
            for path in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def _set_damaged_aside(self) -> None:
        if not self._damaged:
            return
        self._close_writer()
        if jax.process_index() == 0:
            aside = self.directory.parent / f"{self.directory.name}.damaged"
            aside.mkdir(parents=True, exist_ok=True)
            if remote(aside):  # In an object store, a folder exists only if it has a file.
                (aside / "about.txt").write_text("Checkpoints that were found damaged.\n")
            for step in sorted(self._damaged):
                target = aside / f"{step}-{time.time_ns()}"
                (self.directory / str(step)).rename(target)
                logging.warning("Moved the damaged checkpoint of step %d to %s", step, target)
        multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._damaged.clear()


def _manifest(path: epath.Path) -> Json:
    """``step``, ``leaves``, ``crc32s`` and ``metadata`` of the checkpoint ``path``, whose name is
    its step."""
    manifest = get_step_metadata(path).custom_metadata
    if not manifest or with_crc32(manifest["manifest"])[CRC32] != manifest[CRC32]:
        raise DamagedCheckpointError("its metadata has no manifest, or fails its CRC32")
    if (found := manifest["manifest"].get("format")) != FORMAT:
        raise OtherModelError(
            f"{path} has the format {found}, and this version of sbml reads the format {FORMAT}: "
            "install the version that wrote it, or train again in a new folder"
        )
    if str(saved := manifest["manifest"]["step"]) != path.name:
        raise DamagedCheckpointError(f"it was saved as step {saved}: rename its folder to {saved}")
    return manifest["manifest"]


def _leaves(tree: PyTree) -> list[list[str | list[int]]]:
    """``[path, shape, dtype]`` of each leaf, in the types that JSON returns."""
    return [
        [keystr(path, simple=True, separator="/"), list(leaf.shape), str(leaf.dtype)]
        for path, leaf in tree_leaves_with_path(tree)
    ]


def _text(leaf: list[str | list[int]] | None) -> str:
    """An entry of :func:`_leaves` for a message; None if there is no further entry."""
    return "no further leaf" if leaf is None else "{0} {2}{1}".format(*leaf)


def shortage(folder: epath.Path, size: int) -> str:
    """The reason why ``size`` + ``OVERHEAD`` bytes do not fit on the disk of ``folder``, or "".

    For an object store it is always "". The quota of a user is not known, so a write that exceeds
    the quota fails later.
    """
    if remote(folder):
        return ""
    while not folder.exists():
        folder = folder.parent
    free, needed = shutil.disk_usage(folder).free, size + OVERHEAD
    if free >= needed:
        return ""
    return f"the disk of {folder} is full: {free / 1e6:.1f} MB are free, {needed / 1e6:.1f} needed"


def _not_of_orbax(record: stdlib_logging.LogRecord) -> bool:
    """False for errors that Orbax logs: they are also raised, and this module logs each once."""
    return record.levelno < stdlib_logging.ERROR or "orbax" not in record.pathname


@functools.cache  # once in a process
def _leave_out_late_writes() -> None:
    """Do not show the errors of arrays whose writing ends after their save has failed: hundreds of
    tracebacks of a closed event loop, which would hide the reason. The error of the save is raised.
    """
    show = sys.unraisablehook

    def without_late_writes(error: "sys.UnraisableHookArgs") -> None:
        if str(error.exc_value) != "Event loop is closed":
            show(error)

    sys.unraisablehook = without_late_writes
