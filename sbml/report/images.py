"""Images for people: grids of enlarged pixels, and PNG files."""

import io

import numpy as np
from PIL import Image

GAP_GREY = 128  # the grey between images, visible on light and on dark pages


def image_grid(
    images: np.ndarray, levels: int, columns: int = 8, scale: int = 1, gap: int = 2
) -> np.ndarray:
    """Tile images row by row: uint8 (m, h, w, c) of 0 … L - 1 -> uint8 (H, W, c) of 0 … 255.

    A pixel becomes scale x scale equal pixels. Between neighbours lie ``gap`` grey pixels, so
    H = rows (h scale + gap) - gap with rows = ceil(m / columns), and likewise W. Cells without
    an image are grey. Of images with other than 1 or 3 channels the first channel is shown.

    Raises:
      ValueError: the images are not uint8 (m, h, w, c) with m > 0 and pixels below ``levels``, or
        another argument is out of its range.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.dtype != np.uint8 or images.size == 0:
        raise ValueError(
            f"Got images {images.dtype}{images.shape}: give one or more, uint8 (m, h, w, c)."
        )
    if not 2 <= levels <= 256 or images.max() >= levels:
        raise ValueError(
            f"Got levels={levels}, greatest pixel {images.max()}: give the number of levels of the "
            "data, 2 to 256, which is above every pixel."
        )
    if columns < 1 or scale < 1 or gap < 0:
        raise ValueError(
            f"Got {columns=}, {scale=}, {gap=}: columns and scale are at least 1, gap 0."
        )
    if images.shape[-1] not in (1, 3):
        images = images[..., :1]
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
    """The bytes of a PNG file of ``array``, uint8 (h, w), (h, w, 1) or (h, w, 3).

    Raises:
      ValueError: ``array`` has another type or shape.
    """
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
