"""Fidelity of images to others drawn from the same noise."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tfmq.errors import require
from tfmq.evaluation.sampling import Images

# Identical images have no finite PSNR. A single value off by one among 2**20 gives 108 dB: beyond 100 dB
# nothing is left to see.
PSNR_CAP = 100.0
# Side in pixels of SSIM's window, as far as the image is not smaller.
WINDOW = 7

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PairedFidelity:
    """PSNR in dB and SSIM of each pair of images, `[N]` both."""

    psnr_db: Floats
    ssim: Floats

    @property
    def mean_psnr_db(self) -> float:
        """Mean over images of their PSNR."""
        return float(self.psnr_db.mean())

    @property
    def min_psnr_db(self) -> float:
        """PSNR of the pair that differs most."""
        return float(self.psnr_db.min())

    @property
    def mean_ssim(self) -> float:
        """Mean over images of their SSIM."""
        return float(self.ssim.mean())


def psnr(reference: Images, images: Images) -> Floats:
    """Return `10 log10(255**2 / MSE)` of each pair, in dB, at most `PSNR_CAP`."""
    difference = reference.astype(np.float64) - images.astype(np.float64)
    error = np.square(difference).reshape(len(difference), -1).mean(axis=1)
    floor = 255.0**2 / 10 ** (PSNR_CAP / 10)
    result: Floats = 10 * np.log10(255.0**2 / np.maximum(error, floor))
    return result


def ssim(reference: Images, images: Images) -> Floats:
    """Return the structural similarity of each pair (Wang et al., 2004; uniform window of 7, or of the
    largest odd size that fits).

    Raises:
        ValueError: images smaller than 3 pixels a side.
        MissingExtraError: scikit-image is not installed.
    """
    metrics = require("skimage.metrics", extra="report")
    side = min(reference.shape[1:3])
    if side < 3:
        raise ValueError(
            f"structural similarity needs images of at least 3 x 3 pixels, got {reference.shape[1:3]}"
        )
    window = min(WINDOW, side - 1 + side % 2)
    pairs = zip(reference, images, strict=True)
    return np.array(
        [
            metrics.structural_similarity(a, b, data_range=255, channel_axis=-1, win_size=window)
            for a, b in pairs
        ],
        dtype=np.float64,
    )


def paired_fidelity(reference: Images, images: Images) -> PairedFidelity:
    """Compare images pair by pair, uint8 `[N, H, W, C]` both.

    Raises:
        ValueError: other shapes or types.
    """
    if reference.shape != images.shape or reference.ndim != 4 or not len(reference):
        raise ValueError(
            f"pairs need two arrays [N, H, W, C] of one shape, got {reference.shape} and {images.shape}"
        )
    if reference.dtype != np.uint8 or images.dtype != np.uint8:
        raise ValueError(f"pairs need uint8 images, got {reference.dtype} and {images.dtype}")
    return PairedFidelity(psnr(reference, images), ssim(reference, images))
