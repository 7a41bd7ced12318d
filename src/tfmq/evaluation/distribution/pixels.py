"""The local extractor: pixels averaged over a grid, which needs no weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.evaluation.distribution.extractor import register_extractor
from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFolder

# Squares a side that an image is averaged to, for pooled and for spatial features.
GRID = 8
FINE = 16


class PooledPixels:
    """Means of the pixels in [0, 1] over an 8 x 8 grid (`pool`, 192 features) and over a 16 x 16 grid
    (`spatial`, 768).

    It sees layout and colour, no content: a distance on it compares with nothing but itself.
    """

    kinds: tuple[Kind, ...] = ("pool", "spatial")

    def describe(self) -> dict[str, Any]:
        """Return what the features depend on."""
        return {"name": "pooled-pixels", "grid": GRID, "fine": FINE}

    @torch.no_grad()
    def __call__(self, images: Images) -> Mapping[Kind, Tensor]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        pool, spatial = (nn.functional.adaptive_avg_pool2d(pixels, size).flatten(1) for size in (GRID, FINE))
        return {"pool": pool, "spatial": spatial}


@register_extractor("pooled-pixels")
def pooled_pixels(weights: WeightFolder) -> PooledPixels:
    """Build the extractor; it has no weights to find."""
    return PooledPixels()
