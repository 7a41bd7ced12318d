"""Weight grids: per output channel, and per input segment where the input is a concatenation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.numerics.affine import dequantize, quantize
from tfmq.numerics.formats import IntegerFormat
from tfmq.numerics.ranges import min_max, search
from tfmq.numerics.rounding import rectified_sigmoid, rounding_logits


@dataclass(frozen=True)
class WeightGrid:
    """Scale and zero-point of a weight `[C_out, C_in, ...]`, each `[C_out, G]` for `G` input segments of
    widths `segments`.
    """

    format: IntegerFormat
    scale: Tensor
    zero_point: Tensor
    segments: tuple[int, ...] = ()

    def expand(self, values: Tensor, weight_ndim: int) -> Tensor:
        """Return `[C_out, G]` values so that they broadcast against a weight of `weight_ndim` axes."""
        if self.segments:
            values = values.repeat_interleave(torch.tensor(self.segments, device=values.device), dim=1)
        return values.reshape(*values.shape, *([1] * (weight_ndim - 2)))

    def encode(self, weight: Tensor) -> Tensor:
        """Return the nearest codes of `weight`, as integers in float."""
        return quantize(
            weight,
            self.expand(self.scale, weight.ndim),
            self.expand(self.zero_point, weight.ndim),
            self.format.levels,
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`; differentiable in `codes`."""
        return dequantize(
            codes, self.expand(self.scale, codes.ndim), self.expand(self.zero_point, codes.ndim)
        )


@torch.no_grad()
def fit_grid(
    weight: Tensor, fmt: IntegerFormat, *, segments: Sequence[int] = (), method: str = "search"
) -> WeightGrid:
    """Fit the grid of a weight `[C_out, C_in, ...]` by `"search"` (least error over shrunk ranges) or
    `"min_max"`, in float32.
    """
    fit = {"search": search, "min_max": min_max}[method]
    weight = weight.float()
    parts = weight.split(tuple(segments), dim=1) if segments else (weight,)
    fitted = [fit(part.flatten(1), fmt) for part in parts]
    scale, zero_point = (torch.stack(columns, dim=1) for columns in zip(*fitted, strict=True))
    return WeightGrid(fmt, scale, zero_point, tuple(segments))


class AdaptiveRounding(torch.nn.Module):
    """The roundings of one weight as a trainable tensor (AdaRound): codes are `clamp(floor(w / s) + h(V) +
    z)`.

    `logits` start where `h(V)` is the fraction of `w / s`, so the soft weight starts at full precision inside
    the grid's range.
    """

    floor: Tensor

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__()
        scaled = weight.detach() * grid.expand(grid.scale, weight.ndim).reciprocal()
        self.grid = grid
        self.register_buffer("floor", scaled.floor() + grid.expand(grid.zero_point, weight.ndim))
        self.logits = torch.nn.Parameter(rounding_logits((scaled - scaled.floor()).clamp(0.0, 1.0 - 1e-4)))

    def soft(self) -> Tensor:
        """Return `h(V)` in `[0, 1]`, of the weight's shape."""
        return rectified_sigmoid(self.logits)

    def codes(self, *, hard: bool) -> Tensor:
        """Return codes: with the soft roundings while learning, with `V >= 0` rounding up when done."""
        up = (self.logits >= 0).to(self.floor.dtype) if hard else self.soft()
        return (self.floor + up).clamp(0, self.grid.format.levels - 1)
