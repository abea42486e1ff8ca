"""Images as grids of enlarged pixels, and as PNG files; the grids of the report's page."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from jaxtyping import Integer
from PIL import Image

from sbml.core.door import condition, typed
from sbml.core.scalars import Count

GAP_GREY = 128  # the grey between images, visible on light and on dark pages
PAGE_WIDTH = 1056  # pixels, as in report.css
STRIP_IMAGES, SAMPLE_COLUMNS, SAMPLE_ROWS = 10, 16, 8
PIXEL_BUDGET = 150_000  # bytes before compression, for each strip and half the sample grid


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


def few(images: np.ndarray, levels: int) -> bytes:
    """A PNG file with a grid of the first ``images``, at most 4 rows of 8."""
    count = min(32, max(1, 2 * PIXEL_BUDGET // images[0].size))
    scale = max(1, 48 // max(images.shape[1:3]))
    return png(image_grid(images[:count], levels, min(8, count, len(images)), scale))


def extremes(
    table: Mapping[str, np.ndarray], bits: np.ndarray, images: np.ndarray, levels: int
) -> list[list[dict[str, object]]]:
    """The images with the smallest bits/dim, best first, and with the largest, worst first. Values
    that are not finite count as the worst."""
    ids, names, classes = np.asarray(table["id"]), table.get("name"), table.get("class")
    order = np.argsort(np.where(np.isfinite(bits), bits, np.inf), kind="stable")
    count = min(STRIP_IMAGES, max(1, len(ids) // 2), max(1, PIXEL_BUDGET // images[0].size))
    scale = max(1, 96 // max(images.shape[1:3]))
    return [
        [
            {
                "png": png(image_grid(images[ids[i]][None], levels, 1, scale)),
                "name": str(ids[i] if names is None else names[i]),
                "caption": f"id {ids[i]}" if names is None else str(names[i]),
                "class": None if classes is None else str(classes[i]),
                "bits_per_dim": float(bits[i]),
                "finite": math.isfinite(bits[i]),
            }
            for i in places[:count]
        ]
        for places in (order, order[::-1])
    ]


def sample_grid(samples: np.ndarray, levels: int, classes: Sequence[str]) -> tuple[str, bytes]:
    """The caption and the grid of ``samples``. Sample i has the class i modulo the number of
    classes, and each column has one class, unless there are more classes than columns."""
    count = len(classes)
    scale = max(1, 64 // max(samples.shape[1:3]))
    columns = min(SAMPLE_COLUMNS, max(1, PAGE_WIDTH // (samples.shape[2] * scale)))
    columns -= columns % count if 0 < count <= columns else 0
    rows = min(SAMPLE_ROWS, max(1, 2 * PIXEL_BUDGET // (columns * samples[0].size)))
    shown = samples[: rows * columns]
    total = f" of {len(samples):,}" if len(shown) < len(samples) else ""
    alt = f"{len(shown):,}{total} samples from the model, not selected."
    if count > columns:
        alt += f" Sample i is of the class i modulo {count}, counted from 0."
    elif count:
        again = ", and these again" if columns > count else ""
        alt += f" Each column has one class: {', '.join(classes)}{again}."
    return alt, png(image_grid(shown, levels, min(columns, len(shown)), scale))
