"""Arrays that are prepared once, stored on disk, and memory-mapped afterwards.

The images are first written to ``train.part``. The complete file is renamed to ``train.npy``, so a
killed process never leaves an incomplete array under that name. While one process prepares an
array, a lock makes the others wait. The lock is released when its owner ends. A file of notes
beside the array has its CRC32, which is compared when the array is opened. A damaged array is
prepared again.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging
from filelock import FileLock

from sbml.runtime.files import DamagedFileError, read_json, write_json

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


def load_or_build(
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
    found = _opened(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            found = _opened(path)  # another process may have prepared it meanwhile
            if found is None:
                _write(path, build)
                found = _opened(path)
    assert found is not None
    return found


def _opened(path: Path) -> tuple[np.ndarray, dict[str, Any]] | None:
    """The array and its notes, or None if it is missing or, with a warning, damaged."""
    if not path.exists():
        return None
    again = "the images are prepared again"
    try:
        notes = read_json(path.with_suffix(".json"), again)
        if notes.pop("array_crc32", None) != _crc32(path):
            raise DamagedFileError(path, "it fails its CRC32", again)
    except (DamagedFileError, FileNotFoundError) as error:
        logging.warning("%s", error)
        return None
    return np.load(path, mmap_mode="r"), notes


def _crc32(path: Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32


def _write(path: Path, build: Callable[[Add], dict[str, Any]]) -> None:
    part, notes = path.with_suffix(".part"), path.with_suffix(".json")
    try:
        with part.open("wb") as file:
            rows = _Rows(file)
            kept = build(rows.add)
            rows.close()
        write_json(notes, {**kept, "array_crc32": _crc32(part)})
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
