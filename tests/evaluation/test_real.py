"""Real images: folders, arrays, statistics, and what is none of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tfmq.evaluation.real import RealImages, RealStatistics, open_real
from tfmq.storage.errors import CheckpointError, ForeignFileError, MissingFileError


def pictures(count: int = 4, side: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side + 1, 3), dtype=np.uint8)


def as_images(source: Path) -> RealImages:
    opened = open_real(source)
    assert isinstance(opened, RealImages)
    return opened


def test_a_folder_is_read_in_order_and_on_demand(tmp_path: Path) -> None:
    arrays = pictures()
    (tmp_path / "b").mkdir()
    for name, array in zip(("a.png", "b/0.png", "b/1.PNG", "c.bmp"), arrays, strict=True):
        Image.fromarray(array).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    real = as_images(tmp_path)
    assert real.count == 4 and real.size == (5, 6) and np.array_equal(real.read(range(1, 3)), arrays[1:3])
    (tmp_path / "b" / "0.png").write_bytes(b"broken")
    assert np.array_equal(real.read(range(2, 4)), arrays[2:])
    with pytest.raises(ForeignFileError, match=r"0\.png is no readable image"):
        real.read(range(4))
    assert as_images(tmp_path).described["files"] != real.described["files"]


def test_images_of_one_size(tmp_path: Path) -> None:
    for name, side in (("a.png", 5), ("b.png", 5), ("c.png", 6)):
        Image.fromarray(pictures(1, side)[0]).save(tmp_path / name)
    with pytest.raises(ForeignFileError, match=r"c\.png is 7 x 6 pixels, .*a\.png is 6 x 5"):
        as_images(tmp_path).read(range(3))


@pytest.mark.parametrize("name", ["images", "arr_0"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_array(tmp_path: Path, name: str, channels: int) -> None:
    arrays = pictures()[..., :channels]
    np.savez(tmp_path / "i.npz", **{name: arrays})  # type: ignore[arg-type]
    real = as_images(tmp_path / "i.npz")
    assert real.count == 4 and np.array_equal(real.read(range(1, 3)), arrays[1:3])


def test_statistics(tmp_path: Path) -> None:
    mean, covariance = np.arange(3.0), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance, mu_s=mean[:2], sigma_s=covariance[:2, :2])
    real = open_real(tmp_path / "s.npz")
    assert isinstance(real, RealStatistics) and real.moments.of.keys() == {"pool", "spatial"}
    assert (
        torch.equal(real.moments.of["pool"][0], torch.arange(3.0).double())
        and real.moments.of["spatial"][1].dtype == torch.float64
    )
    np.savez(tmp_path / "s.npz", mu=mean, sigma=covariance)
    fewer = open_real(tmp_path / "s.npz")
    assert isinstance(fewer, RealStatistics) and fewer.moments.of.keys() == {"pool"}


BAD: dict[str, dict[str, Any]] = {
    "uint8": {"images": np.zeros((2, 4, 4, 3))},
    "N, H, W": {"arr_0": np.zeros((4, 4, 3), dtype=np.uint8)},
    "1 or 3": {"images": np.zeros((2, 4, 4, 4), dtype=np.uint8)},
    "(0, 4, 4, 3)": {"images": np.zeros((0, 4, 4, 3), dtype=np.uint8)},
    "neither images": {"other": np.zeros(3)},
    "finite": {"mu": np.array([np.nan]), "sigma": np.eye(1)},
    "(2, 2)": {"mu": np.zeros(3), "sigma": np.eye(2)},
}


@pytest.mark.parametrize("cause", BAD)
def test_other_arrays_are_refused(tmp_path: Path, cause: str) -> None:
    np.savez(tmp_path / "b.npz", **BAD[cause])
    with pytest.raises(ForeignFileError) as error:
        open_real(tmp_path / "b.npz")
    assert cause in str(error.value) and "b.npz" in str(error.value)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", images=np.array([{"code": "to run"}], dtype=object))
    with pytest.raises(ForeignFileError, match=r"p\.npz is no readable npz"):
        open_real(tmp_path / "p.npz")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut"])
def test_damaged_archives(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(ForeignFileError, match=r"d\.npz"):
        open_real(tmp_path / "d.npz")


def test_what_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "s.pkl").write_text("")
    for name, kind in (
        ("nowhere", MissingFileError),
        ("empty", MissingFileError),
        ("s.pkl", ForeignFileError),
    ):
        with pytest.raises(CheckpointError, match=name) as error:
            open_real(tmp_path / name)
        assert type(error.value) is kind
