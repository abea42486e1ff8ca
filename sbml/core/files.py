"""Files that are written completely or not at all, with checksums that reveal damage.

A file is first written under a temporary name in the same folder and then renamed. Every file that
the program reads again contains a CRC32 of its own content: an ``.npz`` in the comment of its
archive, a JSON object in a last member ``crc32``, a file of JSON lines in such a member of each
line, and a PNG in each of its chunks. Other programs can read all of them as usual. Reading a file
compares its checksum; a difference raises a :class:`DamagedFileError`, which names the file, what
is wrong and what to do.
"""

import contextlib
import io
import json
import uuid
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from absl import logging
from etils import epath
from jax.typing import ArrayLike
from PIL import Image

from sbml.core.types import Json

CRC32 = "crc32"


class DamagedFileError(ValueError):
    """The content of a file has changed since it was written, or another program wrote the file."""

    def __init__(self, path: epath.PathLike, reason: str, remedy: str) -> None:
        super().__init__(f"{path} is damaged ({reason}): {remedy}")


def remote(path: epath.PathLike) -> bool:
    """Whether ``path`` is in an object store, such as ``gs://...``."""
    return "://" in str(path)


def write_whole(path: epath.PathLike, content: bytes) -> None:
    """Write ``content`` to ``path``; if the process is killed meanwhile, an old file remains."""
    path = epath.Path(path)
    if remote(path):  # Object stores show only complete writes, and a rename would copy.
        path.write_bytes(content)
        return
    # Several processes may write the same file at once: each uses its own temporary name.
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        # The system's errors have a number, and some, such as a full disk, name no file. An error
        # without a number has a text of its own.
        if error.errno is not None:
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):  # If the disk cannot be written, no file was made.
            partial.unlink(missing_ok=True)


def write_npz(path: epath.PathLike, columns: Mapping[str, ArrayLike]) -> None:
    """Write arrays, or values that NumPy can convert to arrays.

    The same arrays give the same bytes, because NumPy stores no time stamp."""
    buffer = io.BytesIO()
    np.savez(buffer, **columns)  # type: ignore[arg-type]  # No column is called allow_pickle.
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.comment = _comment(0)
    content = buffer.getvalue()
    comment = _comment(zlib.crc32(content))
    write_whole(path, content[: -len(comment)] + comment)


def read_npz(path: epath.PathLike, remedy: str = "remove it") -> dict[str, np.ndarray]:
    """The arrays of a file that :func:`write_npz` wrote; ``remedy`` ends an error's message.

    :func:`write_npz` does not compress. So a file whose arrays are larger than itself, which could
    fill the memory, is not read."""
    content = epath.Path(path).read_bytes()
    end = len(content) - len(_comment(0))
    if end < 0 or content[end:] != _comment(zlib.crc32(content[:end] + _comment(0))):
        raise DamagedFileError(path, f"its {len(content)} bytes fail their CRC32", remedy)
    try:
        with np.load(io.BytesIO(content)) as file:
            unpacked = sum(member.file_size for member in file.zip.infolist())
            if unpacked > len(content):
                raise ValueError(f"its {len(content)} bytes unpack to {unpacked}")
            return {name: file[name] for name in file.files}
    except (ValueError, MemoryError, zipfile.BadZipFile) as error:
        reason = f"another program wrote it: {str(error).partition(chr(10))[0]}"
        raise DamagedFileError(path, reason, remedy) from error


def intact_npz(path: epath.PathLike) -> dict[str, np.ndarray] | None:
    """The arrays of a file that can be computed again; None if it is missing, or, with a warning,
    if it is damaged."""
    path = epath.Path(path)
    if not path.exists():
        return None
    try:
        return read_npz(path, "its content is computed again")
    except DamagedFileError as error:
        logging.warning("%s", error)
        return None


def read_png(path: epath.PathLike, remedy: str = "remove it") -> bytes:
    """The bytes of a PNG file, whose format has a CRC32 of every chunk."""
    content = epath.Path(path).read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()
    except Exception as error:  # Pillow raises many kinds of errors for damaged files.
        raise DamagedFileError(path, str(error) or type(error).__name__, remedy) from error
    return content


def _comment(crc32: int) -> bytes:
    return f"{CRC32}={crc32:08x}".encode()


def with_crc32(value: Mapping[str, object]) -> Json:
    """``value`` with the CRC32 of its JSON text, in which Python writes all digits of floats."""
    return {**value, CRC32: zlib.crc32(json.dumps(value, sort_keys=True).encode())}


def json_line(value: Mapping[str, object]) -> str:
    """An object of plain JSON values as a line of a file of JSON lines."""
    return json.dumps(with_crc32(value)) + "\n"


def without_crc32(text: str | bytes) -> Json:
    """The object that was given to :func:`with_crc32`, read from its JSON ``text``. A ValueError
    says that the text has no checksum, or that the checksum is wrong."""
    value = json.loads(text)
    crc32 = value.pop(CRC32, None) if isinstance(value, dict) else None
    if crc32 is None or with_crc32(value)[CRC32] != crc32:
        raise ValueError("it fails its CRC32, or has none")
    return value


def write_json(path: epath.PathLike, value: Mapping[str, object]) -> None:
    """Write an object of plain JSON values."""
    write_whole(path, json.dumps(with_crc32(value), indent=1).encode())


def read_json(path: epath.PathLike, remedy: str = "remove it") -> Json:
    """The object of a file that :func:`write_json` wrote; ``remedy`` as for :func:`read_npz`."""
    content = epath.Path(path).read_bytes()
    try:
        return without_crc32(content)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(path, str(error), remedy) from None
