"""The picture of a comparison."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfmq.evaluation.comparison import Comparison
from tfmq.report.comparison import BORDER, COLUMNS, LEFT, TOP, difference, write_comparison
from tfmq.report.pictures import enlarged, montage

Make = Callable[..., Comparison]


def test_difference_is_scaled_into_view() -> None:
    a = np.full((1, 4, 4, 3), 100, dtype=np.uint8)
    picture, gain = difference(a, a - 7)
    assert gain == 20 and (picture == 140).all()
    picture, gain = difference(a, a + 150)
    assert gain == 1 and (picture == 150).all()
    assert not difference(a, a)[0].any()
    picture, gain = difference(np.zeros_like(a), np.full_like(a, 255))
    assert gain == 1 and (picture == 255).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_holds_the_images_unchanged(tmp_path: Path, comparison: Make, channels: int) -> None:
    made = comparison(count=COLUMNS + 3, channels=channels)
    write_comparison(tmp_path / "c.png", made, title="t")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB"))
    rows = [
        images[:COLUMNS] if channels == 3 else images[:COLUMNS].repeat(3, axis=-1)
        for images in (made.reference, made.quantized)
    ]
    rows.append(difference(*rows)[0])
    expected = montage(enlarged(np.concatenate(rows)), columns=COLUMNS, gap=6)
    height, width = expected.shape[:2]
    assert pixels.shape[:2] == (TOP + height + BORDER, LEFT + width + BORDER)
    assert np.array_equal(pixels[TOP : TOP + height, LEFT : LEFT + width], expected)
    # Labels and title: dark pixels in the margins.
    assert pixels[TOP:, : LEFT - 8].min() < 100 and pixels[:40].min() < 100


def test_one_pair_leaves_room_for_the_title(tmp_path: Path, comparison: Make) -> None:
    write_comparison(
        tmp_path / "c.png",
        comparison(count=1),
        title="tfmq_w4a8   PSNR 100.0 dB   SSIM 0.888   888.88 MB → 888.88 MB (0.888x)",
    )
    assert (np.asarray(Image.open(tmp_path / "c.png").convert("L"))[:, -8:] == 255).all()


def test_equal_comparisons_are_equal_bytes(tmp_path: Path, comparison: Make) -> None:
    for name in ("a.png", "b.png"):
        write_comparison(tmp_path / name, comparison(), title="t")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
