"""Weight grids: per output channel, and per input segment where the input is a concatenation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.numerics.grids import Grid
from tfmq.numerics.ranges import min_max, search
from tfmq.numerics.rounding import rectified_sigmoid, rounding_logits
from tfmq.numerics.segments import split, spread


@dataclass(frozen=True)
class WeightGrid:
    """Scale and zero-point of a weight `[C_out, C_in, ...]`, each `[C_out, G]` for `G` input segments of
    widths `segments`.
    """

    format: Grid
    scale: Tensor
    zero_point: Tensor
    segments: tuple[int, ...] = ()

    def expand(self, values: Tensor, weight_ndim: int) -> Tensor:
        """Return `[C_out, G]` values so that they broadcast against a weight of `weight_ndim` axes."""
        values = spread(values, self.segments, axis=1)
        return values.reshape(*values.shape, *([1] * (weight_ndim - 2)))

    def encode(self, weight: Tensor) -> Tensor:
        """Return the nearest codes of `weight`, as integers in float."""
        scaled = weight * self.expand(self.scale, weight.ndim).reciprocal()
        return self.format.nearest_(scaled, self.expand(self.zero_point, weight.ndim))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`; differentiable in `codes`."""
        integers = self.integers(codes.to(self.scale.dtype))
        return integers * self.expand(self.scale, codes.ndim)

    def integers(self, codes: Tensor) -> Tensor:
        """Return the values of `codes` in units of their scales."""
        return self.format.integers(codes, self.expand(self.zero_point, codes.ndim).to(codes.dtype))


@torch.no_grad()
def fit_grid(
    weight: Tensor, fmt: Grid, *, segments: Sequence[int] = (), method: str = "search"
) -> WeightGrid:
    """Fit the grid of a weight `[C_out, C_in, ...]` by `"search"` (least error over shrunk ranges) or
    `"min_max"`, in float32.
    """
    fit = {"search": search, "min_max": min_max}[method]
    weight = weight.float()
    fitted = [fit(part.flatten(1), fmt) for part in split(weight, segments, axis=1)]
    scale, zero_point = (torch.stack(columns, dim=1) for columns in zip(*fitted, strict=True))
    return WeightGrid(fmt, scale, zero_point, tuple(segments))


class AdaptiveRounding(torch.nn.Module):
    """The roundings of one weight as a trainable tensor (AdaRound): a code is the one below the weight, plus
    `h(V)`.

    `logits` start where `h(V)` is the share of the way to the code above, so the soft weight starts at full
    precision inside the grid's range.
    """

    floor: Tensor

    def __init__(self, weight: Tensor, grid: WeightGrid) -> None:
        super().__init__()
        scaled = weight.detach() * grid.expand(grid.scale, weight.ndim).reciprocal()
        self.grid = grid
        floor, share = grid.format.below(scaled, grid.expand(grid.zero_point, weight.ndim))
        self.register_buffer("floor", floor)
        self.logits = torch.nn.Parameter(rounding_logits(share.clamp(0.0, 1.0 - 1e-4)))

    def soft(self) -> Tensor:
        """Return `h(V)` in `[0, 1]`, of the weight's shape."""
        return rectified_sigmoid(self.logits)

    def codes(self, *, hard: bool) -> Tensor:
        """Return codes: with the soft roundings while learning, with `V >= 0` rounding up when done."""
        up = (self.logits >= 0).to(self.floor.dtype) if hard else self.soft()
        return (self.floor + up).clamp(0, self.grid.format.levels - 1)
