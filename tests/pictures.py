"""Images that several tests of the data use."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from sbml import data


def numbered(
    n: int, *, name: str = "numbered", shape: tuple[int, ...] = (4, 5, 3)
) -> data.ImageSet:
    """Images that differ from each other and from all mirror images."""
    images = np.random.default_rng(n).integers(0, 250, (n, *shape), dtype=np.uint8)
    return data.ImageSet(name, "1", "train", images)


def save(path: Path, pixels: np.ndarray, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def pixels(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_deep(path: Path, pixels: np.ndarray) -> None:
    """Write uint16 ``(height, width, 2 to 4)`` with 16 bits a channel, which Pillow cannot do.

    The last of 2 or 4 channels is the alpha of a PNG or TIFF.
    """
    height, width, channels = pixels.shape
    data = pixels.astype(">u2").tobytes()
    if path.suffix == ".ppm":
        path.write_bytes(f"P6 {width} {height} 65535 ".encode() + data)
    elif path.suffix == ".png":
        kind = {2: 4, 3: 2, 4: 6}[channels]
        header = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
        file = b"\x89PNG\r\n\x1a\n"
        for name, text in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            file += struct.pack(">I", len(text)) + name + text
            file += struct.pack(">I", zlib.crc32(name + text))
        path.write_bytes(file)
    else:
        tags = {256: [width], 257: [height], 258: [16] * channels, 259: [1], 262: [2]}
        tags |= {273: [8], 277: [channels], 278: [height], 279: [len(data)]}
        tags |= {284: [1], **({338: [2]} if channels == 4 else {})}
        start, entries, values = 8 + len(data), b"", b""
        for tag, numbers in tags.items():
            packed = struct.pack(f">{len(numbers)}H", *numbers).ljust(4, b"\0")
            if len(packed) > 4:
                where = start + 2 + 12 * len(tags) + 4 + len(values)
                packed, values = struct.pack(">I", where), values + packed
            entries += struct.pack(">HHI", tag, 3, len(numbers)) + packed
        directory = struct.pack(">H", len(tags)) + entries + bytes(4)
        path.write_bytes(b"MM\0*" + struct.pack(">I", start) + data + directory + values)
