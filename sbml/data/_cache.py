"""Arrays on disk: prepared once, memory-mapped ever after.

An array gets its name only when it is whole. Images stream into ``train.part``, which becomes
``train.npy`` in one rename, so a kill at any moment leaves no half array to be mistaken for a whole
one. A lock makes other processes wait for the one that prepares; it ends with its owner.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock

Add = Callable[[np.ndarray], None]


def content_key(files: Iterable[Path], *choices: object) -> str:
    """12 hex digits that change with any file's bytes, their order, or any choice's ``repr``.

    A file that cannot be opened counts as such: once it can, the key changes.
    """
    digest = hashlib.sha256(repr(choices).encode())
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()[:12]


def prepared(
    path: Path, build: Callable[[Add], dict[str, Any]]
) -> tuple[np.ndarray, dict[str, Any]]:
    """The array at ``path`` and the notes kept beside it, built first if they are not there.

    Args:
      path: ends in ``.npy``.
      build: calls its argument with each image, uint8 (h, w, c), in order, and returns the notes,
        plain JSON values.

    Returns:
      A read-only map of the array, uint8 (n, h, w, c), and the notes.

    Raises:
      ValueError: images of several sizes, of another type, or none at all.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if not path.exists():  # another process may have prepared it meanwhile
                _write(path, build)
    return np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())


def _write(path: Path, build: Callable[[Add], dict[str, Any]]) -> None:
    part, notes = path.with_suffix(".part"), path.with_suffix(".json")
    try:
        with part.open("wb") as file:
            rows = _Rows(file)
            kept = build(rows.add)
            rows.close()
        notes.write_text(json.dumps(kept))
        os.replace(part, path)  # last: where the array is, the notes are too
    finally:
        part.unlink(missing_ok=True)


class _Rows:
    """Writes an .npy file image by image, its count known only at the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._shape, self._count = file, (), 0

    def add(self, image: np.ndarray) -> None:
        if image.dtype != np.uint8 or image.ndim != 3:
            raise ValueError(
                f"Image {self._count} is {image.dtype} {image.shape}: uint8 (h, w, c) is needed."
            )
        if self._count == 0:
            self._shape = image.shape
            self._header()
        if image.shape != self._shape:
            raise ValueError(
                f"Image {self._count} has shape {image.shape}, those before {self._shape}: a set "
                "needs one size. Save the images as files and use image_folder, which resizes."
            )
        self._file.write(image.tobytes())
        self._count += 1

    def close(self) -> None:
        if self._count == 0:
            raise ValueError("There is no image to prepare.")
        end_of_header = self._header()
        size = self._count * int(np.prod(self._shape))
        assert self._file.seek(0, os.SEEK_END) == end_of_header + size

    def _header(self) -> int:
        """Numpy pads the header for any count, so it can be written again in place."""
        self._file.seek(0)
        shape = (self._count, *self._shape)
        about = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, about)
        return self._file.tell()
