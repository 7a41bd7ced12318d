"""What metrics of distributions see: features of images, or the statistics of features that were computed
elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

# Pooled features (FID), those of places in the image (sFID), class scores (IS).
Kind = Literal["pool", "spatial", "logits"]


class Features(Protocol):
    """Features of `len(features)` images; `chunks(kind)` streams them in the order of the images, each `[n,
    d]`.
    """

    def __len__(self) -> int: ...

    def chunks(self, kind: Kind) -> Iterator[Tensor]:
        """Yield the features of one kind in the order of the images, each chunk `[n, d]`."""


@dataclass(frozen=True)
class Moments:
    """Mean `[d]` and covariance `[d, d]` of features, by kind: what a statistics file holds."""

    of: Mapping[Kind, tuple[Tensor, Tensor]]


def gathered(features: Features, kind: Kind) -> Tensor:
    """Return all features of one kind, `[N, d]`: numbers, no images."""
    return torch.cat(list(features.chunks(kind)))
