"""The work directory of a run: its lock, checkpoints, tables in parts, and result files.

    checkpoints/, dequantizer/checkpoints/      (program.runtime.checkpoint)
    metrics.jsonl, tensorboard/                 (program.runtime.metrics)
    history.jsonl                               what ran when and where (program.runtime.history)
    architecture.json                           only for a converted checkpoint
    eval/, sampling/, codec/                    tables in parts (program.runtime.parts)
    evaluation.json, per_image.npz, samples.npz, quality.json, latents.npz, pictures, report.*
    train/                                      the same for an evaluation of training images
    images.sbml, codec.json, restored.npz       coded images (sbml.codec)

A file that one mode writes for another is read with :meth:`Workdir.read`, which compares its CRC32;
if the file is damaged, the error names the mode that makes it again.
"""

import os
import socket
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from typing import Self

import jax
from etils import epath

from sbml.core.files import (
    read_json,
    read_npz,
    read_png,
    remote,
    strict,
    write_json,
    write_npz,
    write_whole,
)
from sbml.core.scalars import escaped
from sbml.core.types import Json
from sbml.program.runtime import lock, refusals

FORMAT = 1  # of the .json files that one mode writes for another
ARCHITECTURE = "architecture.json"
CODEC = "codec.json"
EVALUATION = "evaluation.json"
IMAGES = "images.sbml"
LATENTS = "latents.npz"
NEIGHBOURS = "neighbours.png"
PER_IMAGE = "per_image.npz"
QUALITY = "quality.json"
RESTORED = "restored.npz"
SAMPLES = "samples.npz"
TABLE = "table.json"
WHITENING = "whitening.npz"
# The largest number of bytes of the work directory's path. macOS and object stores allow 1,024
# bytes for a path, and the paths of the files in the work directory are longer.
LONGEST = 800
# Variables with which gs:// is reached by another address or through a proxy.
OTHER_WAYS = {"STORAGE_EMULATOR_HOST", "FSSPEC_GS_ENDPOINT_URL", "HTTPS_PROXY", "https_proxy"}
# Folders with the modes that write them. For other modes they may be links to those of another run.
READ_BY_OTHERS = {
    "checkpoints": {"train", "table", "convert"},
    "dequantizer": {"train_dequantizer", "convert"},
}
MADE_BY = {
    ARCHITECTURE: "convert",
    CODEC: "compress",
    EVALUATION: "eval",
    LATENTS: "latents",
    NEIGHBOURS: "quality",
    QUALITY: "quality",
    SAMPLES: "sample",
    TABLE: "table",
    WHITENING: "table",
}


class Workdir(os.PathLike):
    """The folder ``path`` of one run, local or any that etils understands (``gs://...``)."""

    def __init__(self, path: epath.PathLike) -> None:
        try:
            expanded = epath.Path(path).expanduser()  # Shells do not expand --workdir=~/runs.
            self.path = epath.Path(refusals.relative(str(expanded)))
        except KeyError:
            raise ValueError(
                f"{path} is no folder of a known kind: give a local path, or gs://bucket/folder"
            ) from None
        if (size := len(os.fsencode(self.absolute))) > LONGEST:
            raise ValueError(
                f"the path of the work directory, {self.absolute[:60]}..., has {size} bytes: give "
                f"one of at most {LONGEST}"
            )

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> epath.Path:
        return self.path / name

    @property
    def absolute(self) -> str:
        """The absolute path, without a "/" at its end."""
        path = str(self.path)
        return path.rstrip("/") if remote(path) else os.path.abspath(path)

    @property
    def name(self) -> str:
        """The last part of the absolute path, which is the run's name."""
        return os.path.basename(self.absolute)

    def lock(self, purpose: str) -> AbstractContextManager[None]:
        """A context manager that keeps other processes from running the mode ``purpose`` here.

        Raises a ValueError if the mode could write through a link to a place outside."""
        root = os.path.realpath(self.path)  # The work directory may itself be a link.
        linked = {folder for folder, modes in READ_BY_OTHERS.items() if purpose not in modes}
        for folder, folders, files in () if remote(self.path) else os.walk(self.path):
            for path in (os.path.join(folder, name) for name in folders + files):
                target = os.path.realpath(path) if os.path.islink(path) else root
                inside = os.path.commonpath([root, target]) == root
                if not inside and os.path.relpath(path, self.path) not in linked:
                    raise ValueError(
                        f"{escaped(path)} is a link to {escaped(target)}, and --mode={purpose} "
                        "writes only inside the work directory: remove the link, or make the "
                        "whole work directory a link to a folder on another disk"
                    )
        return lock.hold(self.path, purpose)

    def owner(self, purpose: str) -> str | None:
        """The process that runs the mode ``purpose`` here, in words; None if there is none."""
        return lock.owner(self.path, purpose)

    def connect(self) -> Self:
        """This work directory, after a check that it is neither a file nor below one, and that its
        object store answers, if it is in one."""
        for path in filter(os.path.isfile, (self.path, *self.path.parents)):
            raise ValueError(f"{path} is a file: give a folder")
        try:
            if remote(self.path):
                # Without a network, gcsfs would try for a minute and show its traceback.
                if str(self.path).startswith("gs://") and not OTHER_WAYS & os.environ.keys():
                    socket.create_connection(("storage.googleapis.com", 443), timeout=10).close()
                self.path.exists()
        except Exception as error:  # The package of each store has errors of its own.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self} cannot be reached: {type(error).__name__}: {reason}. For gs:// you need "
                "pip install gcsfs, the network, and credentials"
            ) from error
        return self

    def has(self, name: str) -> bool:
        """Whether the file ``name`` is there."""
        return (self / name).exists()

    def read(self, name: str) -> Json:
        """What :meth:`write` wrote to ``name``: the arrays of an .npz or the object of a .json."""
        read: Callable[[epath.PathLike, str], Json]
        read = read_npz if name.endswith(".npz") else read_json
        found, remedy = read(self / name, self._remedy(name)), self._remedy(name)
        if name.endswith(".json") and (stored := found.pop("format", None)) != FORMAT:
            raise ValueError(
                f"{self / name} has the format {stored}, and this version of sbml reads the format "
                f"{FORMAT}: {remedy}"
            )
        return found

    def read_png(self, name: str) -> bytes:
        """The bytes of the picture ``name``; errors as for :meth:`read`."""
        return read_png(self / name, self._remedy(name))

    def _remedy(self, name: str) -> str:
        """What to do if the file ``name``, which must be there, is damaged."""
        mode = "eval" if name.startswith("per_image") else MADE_BY[name]
        if not self.has(name):
            raise ValueError(f"no {name} in {self}: make it first (--mode={mode})")
        return f"remove it, and make it again by --mode={mode}"

    # Only process 0 writes.

    def write(self, name: str, content: Mapping[str, object]) -> None:
        """Write arrays to an .npz or values to a .json (``strict``), completely or not at all."""
        if jax.process_index() == 0:
            self.path.mkdir(parents=True, exist_ok=True)
            if name.endswith(".npz"):
                write_npz(self / name, content)  # type: ignore[arg-type]
            else:
                write_json(self / name, strict({"format": FORMAT, **content}, name))

    def write_bytes(self, name: str, content: bytes) -> None:
        """Write a picture or page, completely or not at all."""
        if jax.process_index() == 0:
            write_whole(self / name, content)

    def keep(self, pattern: str, names: Container[str]) -> None:
        """Remove the files whose names have the ``pattern``, except for ``names``."""
        for path in self.path.glob(pattern) if jax.process_index() == 0 else ():
            if path.name not in names:
                path.unlink()
