"""Files that are whole or not there, and that tell when their bytes have changed.

Writing goes beside the file's place and then renames. Everything that the program reads back
carries a CRC32 of its own content: an ``.npz`` in the comment of its archive, a JSON object in a
last member ``crc32``, and a file of JSON lines in one of each line. Other programs read all three
as usual. Reading compares; a difference is a :class:`DamagedFileError`, which names the file, what
is wrong and what to do.
"""

import io
import json
import uuid
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from etils import epath

CRC32 = "crc32"


class DamagedFileError(ValueError):
    """A file whose content is not what was written, or that was written by something else.

    Attributes:
      path: the file.
      reason: what is wrong.
    """

    def __init__(self, path: epath.PathLike, reason: str, remedy: str) -> None:
        super().__init__(f"{path} is damaged ({reason}): {remedy}")
        self.path, self.reason = path, reason


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path``; a process killed meanwhile leaves the old file, if any."""
    path = epath.Path(path)
    if "://" in str(path):  # An object store shows only whole writes; its rename is a copy.
        path.write_bytes(content)
        return
    # Several processes may write the same file at once: each beside it, under a name of its own.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_npz(path: epath.PathLike, columns: Mapping[str, np.ndarray]) -> None:
    """Write arrays; the same arrays give the same bytes, for NumPy stores no time stamp."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _comment(0)
    content = buffer.getvalue()
    comment = _comment(zlib.crc32(content))
    write_whole(path, content[: -len(comment)] + comment)


def read_npz(path: epath.PathLike, remedy: str = "remove it") -> dict[str, np.ndarray]:
    """The arrays of a file that :func:`write_npz` wrote.

    Args:
      path: the file.
      remedy: what the message of an error tells the user to do.

    Raises:
      DamagedFileError: for any other content.
    """
    content = epath.Path(path).read_bytes()
    end = len(content) - len(_comment(0))
    if end < 0 or content[end:] != _comment(zlib.crc32(content[:end] + _comment(0))):
        raise DamagedFileError(path, f"its {len(content)} bytes fail their CRC32", remedy)
    with np.load(io.BytesIO(content)) as file:
        return {name: file[name] for name in file.files}


def intact_npz(path: epath.PathLike) -> dict[str, np.ndarray] | None:
    """The arrays of a file that can be made again: None if it is missing, or damaged with a
    warning that names it."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        return read_npz(path, "what it held is computed again")
    except DamagedFileError as error:
        logging.warning("%s", error)
        return None


def _comment(crc32: int) -> bytes:
    return f"{CRC32}={crc32:08x}".encode()


def stamped(value: Mapping[str, Any]) -> dict[str, Any]:
    """``value`` with the CRC32 of its JSON, whose floats Python writes to the last digit."""
    return {**value, CRC32: zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def unstamped(text: str | bytes) -> dict[str, Any]:
    """The JSON object that :func:`stamped` made.

    Raises:
      ValueError: saying what is wrong with ``text``.
    """
    found = json.loads(text)
    if not isinstance(found, dict) or CRC32 not in found:
        raise ValueError(f"it has no {CRC32}")
    crc32 = found.pop(CRC32)
    if stamped(found)[CRC32] != crc32:
        raise ValueError("it fails its CRC32")
    return found


def write_json(path: epath.PathLike, value: Mapping[str, Any]) -> None:
    """Write an object of plain JSON values."""
    write_whole(path, json.dumps(stamped(value), indent=1).encode())


def read_json(path: epath.PathLike, remedy: str = "remove it") -> dict[str, Any]:
    """The object of a file that :func:`write_json` wrote.

    Args:
      path: the file.
      remedy: what the message of an error tells the user to do.

    Raises:
      DamagedFileError: for any other content.
    """
    content = epath.Path(path).read_bytes()
    try:
        return unstamped(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, str(error), remedy) from None
