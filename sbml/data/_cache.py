"""Arrays that are prepared once, stored on disk, and memory-mapped afterwards.

The images are first written to ``train.part``. The complete file is renamed to ``train.npy``, so a
killed process never leaves an incomplete array under that name. While one process prepares an
array, a lock makes the others wait. The lock is released when its owner ends. A file of notes
beside the array has its CRC32, which is compared when the array is opened. A damaged array is
prepared again.
"""

import hashlib
import math
import os
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from absl import logging
from filelock import FileLock

from sbml.core.files import DamagedFileError, read_json, write_json
from sbml.core.types import Json

Add = Callable[[np.ndarray], None]


def content_key(files: Iterable[Path], *choices: object) -> str:
    """12 hex digits that change with any file's bytes, their order, or any choice's ``repr``.

    A file that cannot be opened counts as unreadable, so the key changes once it can be opened.
    """
    digest = hashlib.sha256(repr(choices).encode())
    for file in files:
        try:
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        except OSError:
            digest.update(b"unreadable")
    return digest.hexdigest()[:12]


def load_or_build(path: Path, build: Callable[[Add], Json]) -> tuple[np.ndarray, Json]:
    """The array at ``path`` and the notes kept beside it, built first if they are not there.

    Args:
      path: ends in ``.npy``.
      build: calls its argument with each image, uint8 (h, w, c), in order, and returns the notes,
        plain JSON values.

    Returns:
      A read-only map of the array, uint8 (n, h, w, c), and the notes.
    """
    if (found := _opened(path)) is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.parent / ".lock"):
            if (found := _opened(path)) is None:  # no other process has prepared it meanwhile
                _write(path, build)
                found = _opened(path)
    assert found is not None
    return found


def _opened(path: Path) -> tuple[np.ndarray, Json] | None:
    """The array and its notes, or None if it is missing or, with a warning, damaged."""
    if not path.exists():
        return None
    again = "the images are prepared again"
    try:
        notes = read_json(path.with_suffix(".json"), again)
        if notes.pop("array_crc32", None) != zlib.crc32(np.memmap(path, mode="r")):
            raise DamagedFileError(path, "it fails its CRC32", again)
    except (ValueError, FileNotFoundError) as error:  # A ValueError also if it is empty.
        logging.warning("%s", error)
        return None
    return np.load(path, mmap_mode="r"), notes


def _write(path: Path, build: Callable[[Add], Json]) -> None:
    """Write the array image by image; how many there are is known only at the end."""
    part, notes = path.with_suffix(".part"), path.with_suffix(".json")
    shape: tuple[int, ...] = ()
    count = 0

    def header() -> int:
        """Write the header and return its length, which NumPy makes the same for any count."""
        file.seek(0)
        about = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        np.lib.format.write_array_header_1_0(file, about)
        return file.tell()

    def add(image: np.ndarray) -> None:
        nonlocal shape, count
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (shape or image.shape):
            raise ValueError(
                f"image {count} is {image.dtype} {image.shape}: a set needs one size in uint8, "
                f"here {shape or '(h, w, c)'}. Save them as files for image_folder, which resizes"
            )
        if not count:
            shape = image.shape
            header()
        file.write(image.tobytes())
        count += 1

    try:
        with part.open("wb") as file:
            kept = build(add)
            if not count:
                raise ValueError("there is no image to prepare")
            length = header()
            assert file.seek(0, os.SEEK_END) == length + count * math.prod(shape)
        write_json(notes, {**kept, "array_crc32": zlib.crc32(np.memmap(part, mode="r"))})
        os.replace(part, path)  # last: where the array is, the notes are too
    finally:
        part.unlink(missing_ok=True)
