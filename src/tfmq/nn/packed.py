"""A weight at rest: packed codes with their grid."""

from collections.abc import Callable

import torch
from torch import Tensor

from tfmq.numerics.grids import Grid
from tfmq.numerics.packing import pack_unsigned, packed_shape, unpack_unsigned
from tfmq.numerics.segments import scales
from tfmq.quantizers.part import Execution, Part
from tfmq.quantizers.weight import WeightGrid, fit_grid


class PackedWeight(Part):
    """A module with the packed codes of a weight of `shape` `[rows, ...]`.

    `packed` is uint8 `[rows, ceil(bits * n / 8)]` for `n` codes a row; `scale` float32 and `zero_point` uint8
    are `[rows, G]` for `G` `segments` of axis 1 (no zero-point for symmetric formats). With a `group` of
    channels, zero-point and `multiplier`, uint8, have a column for each group. While its execution `shelves`
    them, the packed codes stay in host memory, wherever the module goes.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor | None
    multiplier: Tensor | None

    def __init__(
        self, fmt: Grid, shape: tuple[int, ...], *, segments: tuple[int, ...] = (), group: int = 0
    ) -> None:
        super().__init__()
        self.format = fmt
        self.shape = tuple(shape)
        self.segments = tuple(segments)
        self.group = group
        grids = (self.shape[0], scales(self.segments))
        columns = (self.shape[0], self.shape[1] // group) if group else grids
        self.register_buffer(
            "packed", torch.zeros(packed_shape(self.shape, bits=fmt.bits), dtype=torch.uint8)
        )
        self.register_buffer("scale", torch.ones(grids))
        self.register_buffer("zero_point", None if fmt.symmetric else torch.zeros(columns, dtype=torch.uint8))
        self.register_buffer("multiplier", torch.ones(columns, dtype=torch.uint8) if group else None)

    @property
    def codes(self) -> Tensor:
        """Unsigned codes, uint8, of the weight's shape."""
        return unpack_unsigned(self.packed.to(self.scale.device), bits=self.format.bits, shape=self.shape)

    @property
    def grid(self) -> WeightGrid:
        """The grid that the codes refer to."""
        multiplier = None if self.multiplier is None else self.multiplier.to(self.scale.dtype)
        like = self.scale if multiplier is None else multiplier
        zero_point = torch.full_like(like, self.format.middle) if self.zero_point is None else self.zero_point
        return WeightGrid(
            self.format, self.scale, zero_point.to(like.dtype), self.segments, self.group, multiplier
        )

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, for code that looks at a layer's weight."""
        return self.grid.decode(self.codes.to(self.scale.dtype))

    @property
    def stock_weight(self) -> Tensor:
        """The dequantized weight in the layout of the stock module."""
        return self.weight

    @torch.no_grad()
    def fill(self, codes: Tensor, grid: WeightGrid) -> None:
        """Take over `codes`, uint8, on a `grid` of the same format, segments and group."""
        self.packed.copy_(pack_unsigned(codes, bits=self.format.bits))
        self.scale.copy_(grid.scale)
        if self.zero_point is not None:
            self.zero_point.copy_(grid.zero_point)
        if self.multiplier is not None and grid.multiplier is not None:
            self.multiplier.copy_(grid.multiplier)

    @property
    def shelved(self) -> bool:
        """Whether the packed codes stay in host memory."""
        return self.execution is not None and self.execution.shelves

    def execute(self, execution: Execution | None) -> None:
        """Compute by an execution, on the device of the weight, where the module may have moved since the
        execution was made.
        """
        super().execute(execution if execution is None else execution.to(self.scale.device))
        self.packed = self.packed.to("cpu" if self.shelved else self.scale.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedWeight":
        packed = self.packed
        super()._apply(fn, recurse)
        if self.shelved:
            self.packed = packed
        return self

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight in the layout of the stock module as this one has it, `[rows, ...]`."""
        return weight

    @torch.no_grad()
    def round(self, weight: Tensor) -> None:
        """Take the nearest codes of another weight of the stock module, on a grid fitted to it; all else
        stays.
        """
        rows = self.rows(weight.float().to(self.packed.device))
        grid = fit_grid(rows, self.format, segments=self.segments, group=self.group)
        self.fill(grid.encode(rows).to(torch.uint8), grid)
