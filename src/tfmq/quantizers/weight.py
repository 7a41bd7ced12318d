"""Weight grids: per output channel, per input segment where the input is a concatenation, and per group of
inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.numerics.grids import Grid
from tfmq.numerics.groups import fit_groups, group_size, has_room, spread_groups
from tfmq.numerics.ranges import min_max, search
from tfmq.numerics.rounding import rectified_sigmoid, rounding_logits
from tfmq.numerics.segments import split, spread


@dataclass(frozen=True)
class WeightGrid:
    """Scale and zero-point of a weight `[C_out, C_in, ...]`, each `[C_out, G]` for `G` input segments of
    widths `segments`.

    With a `group` of channels (`tfmq.numerics.groups`), zero-point and `multiplier` are `[C_out, C_in /
    group]`, whole numbers in float: the step from one integer of the grid to the next is the multiple of the
    scale.
    """

    format: Grid
    scale: Tensor
    zero_point: Tensor
    segments: tuple[int, ...] = ()
    group: int = 0
    multiplier: Tensor | None = None

    def _wide(self, values: Tensor, weight_ndim: int, *, grouped: bool) -> Tensor:
        values = spread_groups(values, self.group) if grouped else spread(values, self.segments, axis=1)
        return values.reshape(*values.shape, *([1] * (weight_ndim - 2)))

    def steps(self, weight_ndim: int) -> Tensor:
        """Return the step of every weight so that it broadcasts against a weight of `weight_ndim` axes."""
        scale = self._wide(self.scale, weight_ndim, grouped=False)
        if self.multiplier is None:
            return scale
        return scale * self._wide(self.multiplier, weight_ndim, grouped=True)

    def zeros(self, weight_ndim: int) -> Tensor:
        """Return the zero-point of every weight so that it broadcasts alike."""
        return self._wide(self.zero_point, weight_ndim, grouped=bool(self.group))

    def refitted(self, weight: Tensor, *, method: str, segments: Sequence[int] = ()) -> "WeightGrid":
        """Return the grid of another weight, with this one's format and groups, and its segments unless there
        are others.
        """
        segments = segments or self.segments
        return fit_grid(weight, self.format, segments=segments, group=self.group, method=method)

    def encode(self, weight: Tensor) -> Tensor:
        """Return the nearest codes of `weight`, as integers in float."""
        scaled = weight * self.steps(weight.ndim).reciprocal()
        return self.format.nearest_(scaled, self.zeros(weight.ndim))

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of `codes`; differentiable in `codes`."""
        integers = self.integers(codes.to(self.scale.dtype))
        return integers * self._wide(self.scale, codes.ndim, grouped=False)

    def integers(self, codes: Tensor) -> Tensor:
        """Return the values of `codes` in units of their scales."""
        found = self.format.integers(codes, self.zeros(codes.ndim).to(codes.dtype))
        if self.multiplier is None:
            return found
        return found * self._wide(self.multiplier, codes.ndim, grouped=True).to(codes.dtype)


@torch.no_grad()
def fit_grid(
    weight: Tensor, fmt: Grid, *, segments: Sequence[int] = (), group: int = 0, method: str = "search"
) -> WeightGrid:
    """Fit the grid of a weight `[C_out, C_in, ...]` by `"search"` (least error over shrunk ranges) or
    `"min_max"`, in float32.

    `group` is the most channels of a group; 0, a grid that leaves groups no room and channels that do not
    divide into them are one scale a row.
    """
    fit = {"search": search, "min_max": min_max}[method]
    weight = weight.float()
    if size := group_size(segments or weight.shape[1:2], group) if group and has_room(fmt) else 0:
        scale, zero_point, multiplier = fit_groups(weight, fmt, size, segments=segments, method=method)
        return WeightGrid(fmt, scale, zero_point, tuple(segments), size, multiplier)
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
        scaled = weight.detach() * grid.steps(weight.ndim).reciprocal()
        self.grid = grid
        floor, share = grid.format.below(scaled, grid.zeros(weight.ndim))
        self.register_buffer("floor", floor)
        self.logits = torch.nn.Parameter(rounding_logits(share.clamp(0.0, 1.0 - 1e-4)))

    def soft(self) -> Tensor:
        """Return `h(V)` in `[0, 1]`, of the weight's shape."""
        return rectified_sigmoid(self.logits)

    def codes(self, *, hard: bool) -> Tensor:
        """Return codes: with the soft roundings while learning, with `V >= 0` rounding up when done."""
        up = (self.logits >= 0).to(self.floor.dtype) if hard else self.soft()
        return (self.floor + up).clamp(0, self.grid.format.levels - 1)
