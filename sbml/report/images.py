"""Images as people look at them: grids of enlarged pixels, and PNG."""

import io

import numpy as np
from PIL import Image

GAP_GREY = 128  # tells cells apart on light pages and dark ones


def image_grid(
    images: np.ndarray, levels: int, columns: int = 8, scale: int = 1, gap: int = 2
) -> np.ndarray:
    """Tile images row by row: uint8 (m, h, w, c) of 0 … L - 1 -> uint8 (H, W, c) of 0 … 255.

    A pixel becomes scale x scale equal ones; between neighbours lie ``gap`` grey pixels, so
    H = rows (h scale + gap) - gap with rows = ceil(m / columns), and likewise W. Cells without
    an image are grey.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(f"Got images {images.dtype}{images.shape}: pass some, uint8 (m, h, w, c).")
    if not 2 <= levels <= 256 or images.max() >= levels:
        raise ValueError(
            f"Got levels={levels}, greatest pixel {images.max()}: the levels of the "
            "data are needed, 2 to 256 and more than any pixel."
        )
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(f"Got {columns=}, {scale=}, {gap=}: columns and scale start at 1, gap 0.")
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]  # Neither grey nor red, green and blue: the first is shown.
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    height, width = height * scale, width * scale
    pixels = np.rint(images * (255 / (levels - 1))).astype(np.uint8)
    cells = np.full((rows * columns, height + gap, width + gap, channels), GAP_GREY, np.uint8)
    cells[:count, :height, :width] = pixels.repeat(scale, 1).repeat(scale, 2)
    cells = cells.reshape(rows, columns, height + gap, width + gap, channels).swapaxes(1, 2)
    grid = cells.reshape(rows * (height + gap), columns * (width + gap), channels)
    return grid[: grid.shape[0] - gap, : grid.shape[1] - gap]


def png(array: np.ndarray) -> bytes:
    """The bytes of a PNG file; uint8 (h, w), (h, w, 1) or (h, w, 3)."""
    array = np.asarray(array)
    grey = array.ndim == 2 or array.ndim == 3 and array.shape[2] == 1
    if array.dtype != np.uint8 or not (grey or array.ndim == 3 and array.shape[2] == 3):
        raise ValueError(
            f"Got {array.dtype}{array.shape}: PNG takes uint8 (h, w), (h, w, 1) or (h, w, 3)."
        )
    buffer = io.BytesIO()
    Image.fromarray(array.reshape(array.shape[:2]) if grey else array).save(
        buffer, "png", optimize=True
    )
    return buffer.getvalue()
