"""Pictures the data tests share."""

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
