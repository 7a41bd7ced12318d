"""Pairs of images inside a page: every pixel where that fits, smaller where not."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfmq.report.wall import build_wall
from tfmq.storage.errors import ForeignFileError


def noise(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB"))


def test_small_images_keep_every_pixel(tmp_path: Path) -> None:
    images = noise(3, 8)
    np.savez(tmp_path / "p.npz", reference=images, quantized=255 - images)
    wall = build_wall(tmp_path / "p.npz", budget=100_000)
    assert len(wall.pairs) == 3 and "every pixel" in wall.form
    for (before, after), image in zip(wall.pairs, images, strict=True):
        assert np.array_equal(pixels(before), image) and np.array_equal(pixels(after), 255 - image)


@pytest.mark.parametrize("budget", [600_000, 150_000, 40_000])
def test_large_images_fit_the_budget_and_say_how(tmp_path: Path, budget: int) -> None:
    images = noise(4, 300)
    np.savez(tmp_path / "p.npz", reference=images, quantized=images)
    wall = build_wall(tmp_path / "p.npz", budget=budget)
    assert sum(len(uri) for pair in wall.pairs for uri in pair) <= budget and "WebP" in wall.form
    assert f"{pixels(wall.pairs[0][0]).shape[1]} of 300 pixels" in wall.form


@pytest.mark.parametrize("content", [b"", b"text", None, "shape", "dtype"])
def test_what_holds_no_pairs(tmp_path: Path, content: bytes | str | None) -> None:
    path = tmp_path / "p.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        other = {
            None: {},
            "shape": {"quantized": noise(1, 4)},
            "dtype": {"quantized": noise(2, 4).astype(float)},
        }[content]
        np.savez(path, reference=noise(2, 4) if content != "dtype" else noise(2, 4).astype(float), **other)
    with pytest.raises(ForeignFileError, match=r"p\.npz"):
        build_wall(path, budget=1000)
