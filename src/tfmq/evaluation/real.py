"""Real images to compare with: a folder, an array, or the statistics of features that somebody computed."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from tfmq.errors import require
from tfmq.evaluation.distribution.features import Kind, Moments
from tfmq.evaluation.sampling import Images
from tfmq.storage.digest import file_digest
from tfmq.storage.errors import ForeignFileError, MissingFileError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Names that the scripts of the papers give mean and covariance of the two kinds of features.
STATISTICS: dict[Kind, tuple[str, str]] = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
ARRAYS = ("images", "arr_0")


@dataclass(frozen=True)
class RealImages:
    """Images of one size `(H, W)`, read when they are asked for; `described` says what they are, as JSON
    values.

    `read(range)` returns uint8 `[n, H, W, C]` and raises `ForeignFileError` for an image that is damaged or
    of another size.
    """

    count: int
    size: tuple[int, int]
    read: Callable[[range], Images]
    described: Mapping[str, Any]


@dataclass(frozen=True)
class RealStatistics:
    """Moments of features that somebody computed; `described` says of which file."""

    moments: Moments
    described: Mapping[str, Any]


Real = RealImages | RealStatistics


def _of_folder(folder: Path) -> RealImages:
    """Return the images in and below a folder, in the order of their paths."""
    pil = require("PIL.Image", extra="report")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise MissingFileError(f"{folder} holds no image; supported are {', '.join(SUFFIXES)}")

    def one(path: Path) -> Images:
        try:
            with pil.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError) as error:
            raise ForeignFileError(
                f"{path} is no readable image ({error}); copy it again or remove it"
            ) from error

    height, width = one(paths[0]).shape[:2]

    def read(indices: range) -> Images:
        images = [one(paths[index]) for index in indices]
        for index, image in zip(indices, images, strict=True):
            if image.shape[:2] != (height, width):
                raise ForeignFileError(
                    f"{paths[index]} is {_size(image.shape)}, {paths[0]} is "
                    f"{_size((height, width))}; crop all to one size"
                )
        return np.stack(images)

    names = "\n".join(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}" for path in paths)
    return RealImages(
        len(paths),
        (height, width),
        read,
        {"images": len(paths), "source": folder.name, "files": hashlib.sha256(names.encode()).hexdigest()},
    )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]} pixels"


def _of_array(path: Path, images: Any) -> RealImages:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not len(images):
        raise ForeignFileError(
            f"{path} holds {images.dtype} {images.shape}; images are uint8 [N, H, W, 1 or 3]"
        )
    return RealImages(
        len(images),
        images.shape[1:3],
        lambda indices: images[indices.start : indices.stop],
        _described(path, images=len(images)),
    )


def _described(path: Path, **more: Any) -> dict[str, Any]:
    return {"source": path.name, "sha256": file_digest(path), **more}


def _moments(path: Path, stored: Mapping[str, Any]) -> Moments:
    found: dict[Kind, tuple[torch.Tensor, torch.Tensor]] = {}
    for kind, names in STATISTICS.items():
        if all(name in stored for name in names):
            mean, covariance = (stored[name] for name in names)
            if (
                mean.ndim != 1
                or covariance.shape != (len(mean), len(mean))
                or not (np.isfinite(mean).all() and np.isfinite(covariance).all())
            ):
                raise ForeignFileError(
                    f"{path} has {names[0]} {mean.shape} and {names[1]} {covariance.shape}; "
                    "statistics are finite [d] and [d, d]"
                )
            found[kind] = torch.from_numpy(mean).double(), torch.from_numpy(covariance).double()
    return Moments(found)


def _of_npz(path: Path) -> Real:
    known = {*ARRAYS, *(name for names in STATISTICS.values() for name in names)}
    try:
        with path.open("rb") as stream, np.load(stream) as archive:
            stored = {name: archive[name] for name in archive.files if name in known}
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise ForeignFileError(f"{path} is no readable npz archive ({error}); copy it again") from error
    for name in ARRAYS:
        if name in stored:
            return _of_array(path, stored[name])
    moments = _moments(path, stored)
    if not moments.of:
        raise ForeignFileError(
            f"{path} holds neither images ({' or '.join(ARRAYS)}) nor statistics (mu and sigma)"
        )
    return RealStatistics(moments, _described(path))


def open_real(source: Path) -> Real:
    """Return real images, or the statistics of their features.

    Args:
        source: a folder of image files, or an `.npz` file with `images` or `arr_0` (uint8 `[N, H, W, C]`) or
            with `mu` and `sigma`.

    Raises:
        MissingFileError: nothing is there.
        ForeignFileError: it is something else, or damaged; names the file.
        MissingExtraError: Pillow is not installed.
    """
    if source.is_dir():
        return _of_folder(source)
    if not source.is_file():
        raise MissingFileError(f"{source} does not exist; pass a folder of images or an .npz file")
    if source.suffix != ".npz":
        raise ForeignFileError(
            f"{source} is neither a folder of images nor an .npz file of images or statistics"
        )
    return _of_npz(source)
