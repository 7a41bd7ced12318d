"""Images as PNG files: one each, and all in a grid."""

import math
from pathlib import Path

import numpy as np

from tfmq.errors import require
from tfmq.evaluation.sampling import Images

SAMPLE_FILES = ("[0-9][0-9][0-9][0-9][0-9]*.png", "grid.png", "samples.npz")
# Value of a white pixel.
WHITE = 255
# Tiny images are enlarged until one is about this many pixels wide; large ones are left as they are.
TILE = 160
# The same width for the images of grid.png.
GRID_TILE = 128


def enlarged(images: Images, *, width: int = TILE) -> Images:
    """Return images `[N, H, W, C]` scaled up by the whole number that brings them nearest to `width`, each
    pixel a square of one colour.
    """
    factor = max(1, round(width / images.shape[2]))
    return images.repeat(factor, axis=1).repeat(factor, axis=2)


def montage(images: Images, *, columns: int, gap: int = 4) -> Images:
    """Return images `[N, H, W, C]` side by side, `columns` a row, on white, as one `[H', W', C]`."""
    count, height, width, channels = images.shape
    rows = math.ceil(count / columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), WHITE, dtype=np.uint8
    )
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + gap), (index % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    return canvas


def write_png(path: Path, image: Images) -> None:
    """Write one image `[H, W, 1 or 3]`; equal pixels give equal bytes. Needs the `report` extra."""
    pil = require("PIL.Image", extra="report")
    pil.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, format="PNG")


def write_samples(directory: Path, images: Images) -> None:
    """Write `00000.png`, `00001.png`, ... at their own size, all of them enlarged in `grid.png`, and
    `samples.npz` with the array `images`.
    """
    for index, image in enumerate(images):
        write_png(directory / f"{index:05d}.png", image)
    columns = math.ceil(math.sqrt(len(images)))
    write_png(directory / "grid.png", montage(enlarged(images, width=GRID_TILE), columns=columns))
    np.savez_compressed(directory / "samples.npz", images=images)
