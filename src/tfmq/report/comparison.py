"""The picture of a comparison: full precision, quantized, and their difference, image by image."""

from pathlib import Path

import numpy as np

from tfmq.errors import require
from tfmq.evaluation.comparison import Comparison
from tfmq.evaluation.sampling import Images, as_colour
from tfmq.report.pictures import TILE, enlarged, montage

# Most pairs of images in the figure, one a column.
COLUMNS = 8
# Factors by which differences may be multiplied to be seen.
GAINS = (1, 2, 5, 10, 20, 50)
# Pixels to an inch of the figure.
DPI = 100
# Pixels around the images: LEFT for the labels of rows, TOP for the title and the line of figures below it,
# BORDER elsewhere.
LEFT, TOP, BORDER = 132, 72, 14


def difference(reference: Images, images: Images) -> tuple[Images, int]:
    """Return `|reference - images| * gain` and the gain: the largest that leaves all but a hundredth of the
    values below white.
    """
    absolute = np.abs(reference.astype(np.int16) - images.astype(np.int16))
    high = float(np.quantile(absolute, 0.99))
    gain = max((gain for gain in GAINS if gain * high <= 255), default=1)
    return np.minimum(absolute * gain, 255).astype(np.uint8), gain


def write_comparison(path: Path, comparison: Comparison, *, title: str) -> None:
    """Draw the first images of both models in one figure, with the PSNR of each pair above its column.

    Args:
        path: where the PNG file is.
        comparison: its first `COLUMNS` pairs are drawn.
        title: one line, such as the scheme, the mean PSNR and the sizes.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="report")
    reference, quantized = (
        as_colour(images[:COLUMNS]) for images in (comparison.reference, comparison.quantized)
    )
    gap, gain = difference(reference, quantized)
    tiles = enlarged(np.concatenate([reference, quantized, gap]), width=TILE)
    columns, tile = len(reference), tiles.shape[2]
    canvas = montage(tiles, columns=columns, gap=6)
    height, width = canvas.shape[:2]
    # Leave a narrow picture room for its title.
    total_width = max(LEFT + width + BORDER, 11 * len(title) + 2 * BORDER)
    total_height = TOP + height + BORDER
    figure = figures.Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes(
        (LEFT / total_width, BORDER / total_height, width / total_width, height / total_height)
    )
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    labels = ("full precision", "quantized", "difference" if gain == 1 else f"difference x {gain}")
    row = tiles.shape[1] + 6
    for number, label in enumerate(labels):
        axes.text(-12, number * row + row / 2, label, ha="right", va="center", fontsize=11, color="#333333")
    for number, value in enumerate(comparison.fidelity.psnr_db[:columns]):
        axes.text(
            number * (tile + 6) + tile / 2,
            -8,
            f"{value:.1f} dB",
            ha="center",
            va="bottom",
            fontsize=9,
            color="#666666",
        )
    figure.text(
        BORDER / total_width,
        1 - 22 / total_height,
        title,
        ha="left",
        va="center",
        fontsize=13,
        color="#111111",
    )
    figure.savefig(path, metadata={"Software": None})
