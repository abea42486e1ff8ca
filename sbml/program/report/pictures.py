"""Images as grids of enlarged pixels, and as PNG files."""

import io
from typing import Annotated

import numpy as np
from jaxtyping import Integer
from PIL import Image

from sbml.core.door import condition, typed
from sbml.core.scalars import Count

GAP_GREY = 128  # the grey between images, visible on light and on dark pages


@typed
def image_grid(
    images: Annotated[Integer[np.ndarray, "m h w c"], condition("with m > 0", lambda a: len(a))],
    levels: Annotated[int, condition("from 2 to 256", lambda count: 2 <= count <= 256)],
    columns: Count = 8,
    scale: Count = 1,
    gap: int = 2,
) -> np.ndarray:
    """Tile images row by row: uint8 (m, h, w, c) of 0 … L - 1 -> uint8 (H, W, c) of 0 … 255.

    A pixel becomes scale x scale equal pixels. There are ``gap`` grey pixels between neighbours, so
    H = rows (h scale + gap) - gap with rows = ceil(m / columns), and likewise W. Cells without
    an image are grey. If images have neither 1 nor 3 channels, only the first channel is shown.
    """
    if images.max() >= levels:
        raise ValueError(
            f"levels={levels}, but the greatest pixel is {images.max()}: give the number of levels "
            "of the data, which is above every pixel"
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


@typed
def png(array: Integer[np.ndarray, "..."]) -> bytes:
    """The bytes of a PNG file of ``array``, uint8 (h, w), (h, w, 1) or (h, w, 3)."""
    buffer = io.BytesIO()
    grey = array.ndim == 3 and array.shape[2] == 1
    Image.fromarray(array[..., 0] if grey else array).save(buffer, "png", optimize=True)
    return buffer.getvalue()
