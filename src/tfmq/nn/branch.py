"""A product of two thin factors beside a quantized layer."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from tfmq.kernels.kernel import IntegerWeight
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.low_rank import LowRank
from tfmq.numerics.operations import Convolution, Linear, Operation
from tfmq.numerics.segments import scales
from tfmq.quantizers.part import Part
from tfmq.quantizers.weight import WeightGrid, fit_grid

BranchType = Literal["float16", "bfloat16", "float32", "int8", "int8_weight_only"]
BRANCH_TYPES: tuple[BranchType, ...] = ("float16", "bfloat16", "float32", "int8", "int8_weight_only")
BYTE = IntegerFormat(8, symmetric=True)


class SideBranch(Part):
    """`up (down x)` beside the product of a layer with its quantized weight `[C_out, C_in / groups, ...]`.

    `down` are rows `[groups * rank, C_in / groups, ...]` of the layer's own operation, `up` `[C_out, rank]`
    is a product at each place. In floating point, `x` is the layer's input before its quantizer. With `int8`
    both factors are integers with a scale for each row, and `x` is the quantized input: the rows of `down`
    are computed together with those of the weight, by the same codes and kernels. With `int8_weight_only`
    they are stored so, and computed in floating point.
    """

    down: Tensor
    up: Tensor
    down_scale: Tensor
    up_scale: Tensor

    def __init__(
        self,
        operation: Operation,
        shape: tuple[int, ...],
        rank: int,
        *,
        dtype: BranchType,
        segments: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.operation, self.rank, self.dtype = operation, rank, dtype
        # Codes of a segment of the input have a grid of their own, which rows that read them follow.
        self.segments = tuple(segments) if self.shared else ()
        rows, stored = operation.groups * rank, torch.int8 if self.integer else getattr(torch, dtype)
        self.register_buffer("down", torch.zeros(rows, *shape[1:], dtype=stored))
        self.register_buffer("up", torch.zeros(shape[0], rank, dtype=stored))
        if self.integer:
            self.register_buffer("down_scale", torch.ones(rows, scales(self.segments)))
            self.register_buffer("up_scale", torch.ones(shape[0], 1))
        once = (1,) * (len(shape) - 2)
        self.mixing: Operation = (
            Linear() if operation.by_token else Convolution(once, (0,) * len(once), once, operation.groups)
        )

    @property
    def integer(self) -> bool:
        """Whether the factors are stored as integers with a scale for each row."""
        return self.dtype in ("int8", "int8_weight_only")

    @property
    def shared(self) -> bool:
        """Whether `down` reads the codes of the layer's input."""
        return self.dtype == "int8"

    @torch.no_grad()
    def fill(self, factors: LowRank) -> None:
        """Take over factors `[G, R, r]` and `[G, r, n]`, rounded to what is stored."""
        self._store("down", factors.down.flatten(0, 1).reshape(self.down.shape), self.segments)
        self._store("up", factors.up.flatten(0, 1), ())

    def _store(self, name: str, values: Tensor, segments: tuple[int, ...]) -> None:
        buffer: Tensor = getattr(self, name)
        if self.integer:
            grid = fit_grid(values, BYTE, segments=segments, method="min_max")
            values = grid.integers(grid.encode(values.float()))
            getattr(self, f"{name}_scale").copy_(grid.scale)
        buffer.copy_(values)

    def rows(self) -> Tensor:
        """Return `down` as rows of a weight, in float32."""
        return self._values("down", self.segments)

    def mixes(self) -> Tensor:
        """Return `up`, in float32."""
        return self._values("up", ())

    def _values(self, name: str, segments: tuple[int, ...]) -> Tensor:
        values: Tensor = getattr(self, name).float()
        if not self.integer:
            return values
        scale: Tensor = getattr(self, f"{name}_scale")
        return values * WeightGrid(BYTE, scale, scale, segments).steps(values.ndim)

    def product(self) -> Tensor:
        """Return what the branch stands for as rows of a weight `[C_out, C_in / groups, ...]`, in float32."""
        groups, down = self.operation.groups, self.rows()
        product = self.mixes().unflatten(0, (groups, -1)) @ down.flatten(1).unflatten(0, (groups, -1))
        return product.flatten(0, 1).reshape(-1, *down.shape[1:])

    def forward(self, input: Tensor) -> Tensor:
        """Return the branch's part of the layer's output, for its input as the branch reads it."""
        return self.mixed(self.operation(input, self.rows().to(input.dtype), None))

    def mixed(self, hidden: Tensor) -> Tensor:
        """Return `up` of what `down` has made."""
        up = self.mixes().to(hidden.dtype)
        return self.mixing(hidden, up.reshape(*up.shape, *[1] * (self.down.ndim - 2)), None)

    def joined(self, weight: IntegerWeight) -> IntegerWeight:
        """Return the integers of a layer with the rows of `down` behind those of each group."""
        groups = self.operation.groups

        def together(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat(
                [part.unflatten(0, (groups, -1)) for part in (one, other.to(one.dtype))], dim=1
            ).flatten(0, 1)

        bias = weight.bias
        return replace(
            weight,
            values=together(weight.values, self.down),
            scale=together(weight.scale, self.down_scale),
            bias=None if bias is None else together(bias, bias.new_zeros(len(self.down))),
        )

    def parted(self, output: Tensor) -> Tensor:
        """Return the layer's output from that of its `joined` integers."""
        axis, groups = self.operation.channel_axis % output.ndim, self.operation.groups
        widths = len(self.up) // groups, self.rank
        if groups == 1:
            own, hidden = output.split(widths, dim=axis)
        else:
            pieces = output.unflatten(axis, (groups, -1)).split(widths, dim=axis + 1)
            own, hidden = (piece.flatten(axis, axis + 1) for piece in pieces)
        return own + self.mixed(hidden)
