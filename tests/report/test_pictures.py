"""Montages and PNG files, pixel by pixel."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tfmq.evaluation.sampling import as_colour
from tfmq.report.pictures import SAMPLE_FILES, enlarged, montage, write_png, write_samples


def images(count: int, height: int = 4, width: int = 6, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def test_montage_places_every_image_on_white() -> None:
    tiles = images(5)
    canvas = montage(tiles, columns=3, gap=2)
    assert canvas.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for index, tile in enumerate(tiles):
        top, left = index // 3 * 6, index % 3 * 8
        assert np.array_equal(canvas[top : top + 4, left : left + 6], tile)
    assert (canvas[4:6] == 255).all() and (canvas[:, 6:8] == 255).all() and (canvas[6:, 16:] == 255).all()


def test_enlarged_repeats_pixels() -> None:
    tiles = images(2, 4, 4)
    large = enlarged(tiles, width=12)
    assert large.shape == (2, 12, 12, 3)
    assert np.array_equal(large[:, 1::3, 2::3], tiles)
    assert enlarged(images(1, 50, 50), width=20).shape == (1, 50, 50, 3)


def test_grey_becomes_colour() -> None:
    grey = images(2, channels=1)
    assert np.array_equal(as_colour(grey), np.concatenate([grey] * 3, axis=-1))
    assert as_colour(images(1)).shape[-1] == 3


@pytest.mark.parametrize("channels", [1, 3])
def test_png_keeps_the_pixels(tmp_path: Path, channels: int) -> None:
    image = images(1, channels=channels)[0]
    write_png(tmp_path / "a.png", image)
    read = Image.open(tmp_path / "a.png")
    assert read.mode == {1: "L", 3: "RGB"}[channels]
    assert np.array_equal(np.asarray(read).reshape(image.shape), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_samples(tmp_path: Path, channels: int) -> None:
    drawn = images(5, channels=channels)
    write_samples(tmp_path, drawn)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"{i:05d}.png" for i in range(5)),
        "grid.png",
        "samples.npz",
    ]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "00003.png")).reshape(drawn[3].shape), drawn[3])
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored.files == ["images"] and stored["images"].dtype == np.uint8
        assert np.array_equal(stored["images"], drawn)
    assert all(any(p.match(pattern) for pattern in SAMPLE_FILES) for p in tmp_path.iterdir())


def test_equal_samples_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_samples(tmp_path / name, images(2))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
