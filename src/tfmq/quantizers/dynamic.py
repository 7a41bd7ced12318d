"""Dynamic activation quantizers: each token gets the grid of its own values, at each call."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq.kernels.kernel import Rows
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import from_range
from tfmq.numerics.segments import scales, split, spread
from tfmq.quantizers.input import InputQuantizer


class DynamicQuantizer(InputQuantizer):
    """One grid for each token `x[b, ..., :]`, or each segment of it, over that token's exact extremes (as in
    Q-DiT, Chen et al., 2024).

    Nothing is calibrated and nothing stored: an outlier costs its own token resolution and no other, at any
    timestep. The price is a pass over the input at each call. A linear layer computes each token by itself,
    so that the grids leave its integer sums alone; a convolution sums over places, which have no common grid,
    and is never quantized so. Gradients pass as through a fixed grid.
    """

    def __init__(self, fmt: IntegerFormat, *, segments: Sequence[int] = ()) -> None:
        super().__init__(fmt, segments=segments, axis=-1)

    def rows(self, x: Tensor) -> Rows:
        """Return the grids of the tokens of `x` `[B, ..., C]`, `[B, ..., G]`."""
        wide = x.detach().to(torch.float32)
        parts = split(wide, self.segments, axis=-1)
        low, high = (
            torch.stack(extremes, dim=-1)
            for extremes in zip(*((part.amin(dim=-1), part.amax(dim=-1)) for part in parts), strict=True)
        )
        scale, zero_point = from_range(low, high, self.format)
        return Rows(scale, zero_point.to(torch.uint8), self.format.levels)

    def parted(self, segments: Sequence[int]) -> "DynamicQuantizer":
        """Return another one."""
        return DynamicQuantizer(self.format, segments=segments)

    def zero_points(self) -> Tensor:
        """Return the codes that real zero can have: all, or the middle one of a symmetric grid."""
        codes = (
            torch.tensor([self.format.middle]) if self.format.symmetric else torch.arange(self.format.levels)
        )
        return codes[:, None].expand(-1, scales(self.segments))

    def describe(self) -> dict[str, Any]:
        """Return grid and segments, with the mark of a dynamic quantizer."""
        return {
            "bits": self.format.bits,
            "symmetric": self.format.symmetric,
            "dynamic": "token",
            "segments": list(self.segments),
        }

    def broadcast(self, values: Tensor, x: Tensor) -> Tensor:
        """Return a field with a value for each token and channel."""
        return spread(values, self.segments, axis=-1).to(x.dtype)

    def extra_repr(self) -> str:
        """Return bits and segments for the printed model."""
        return f"bits={self.format.bits}, dynamic by token, segments={scales(self.segments)}"
