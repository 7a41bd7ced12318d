"""What stands in front of a quantized operand: the contract of every activation quantizer."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq.kernels.kernel import Rows
from tfmq.numerics.affine import fake_quantize, in_dtype
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.part import Part


class InputQuantizer(Part, ABC):
    """Puts an input on grids of `format`. `segments` are the widths along `axis` that have grids of their
    own; `()` is one for all.

    Integer kernels take the grids from `rows` and quantize by themselves; `forward` gives the values on them,
    in floating point. Both use the same grids, so that the backends agree. Nothing but a fitted range is
    state.
    """

    def __init__(self, fmt: IntegerFormat, *, segments: Sequence[int] = (), axis: int = 1) -> None:
        super().__init__()
        self.format = fmt
        self.segments = tuple(segments)
        self.axis = axis

    @abstractmethod
    def rows(self, x: Tensor) -> Rows:
        """Return the grids of `x`."""

    @abstractmethod
    def parted(self, segments: Sequence[int]) -> "InputQuantizer":
        """Return a quantizer like this one, unfitted, for other `segments`."""

    @abstractmethod
    def zero_points(self) -> Tensor:
        """Return every zero-point that can occur, `[any, G]`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return the quantizer without its tensors, as docs/format.md has it."""

    @abstractmethod
    def broadcast(self, values: Tensor, x: Tensor) -> Tensor:
        """Return a field of `rows` so that it broadcasts against `x`, in its dtype."""

    def check_width(self, x: Tensor) -> None:
        """Raise `ValueError` for an input that the segments do not add up to."""
        axis = self.axis % x.ndim
        if self.segments and x.shape[axis] != sum(self.segments):
            raise ValueError(
                f"expected {sum(self.segments)} channels on axis {axis}, "
                f"got an input of shape {tuple(x.shape)}"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` on its grids, in its dtype."""
        self.check_width(x)
        rows = self.rows(x)
        # In half precision the reciprocal of a small scale overflows, so the grid is applied in float32.
        wide = in_dtype(x, torch.promote_types(x.dtype, torch.float32))
        scale, zero_point = (self.broadcast(values, wide) for values in (rows.scale, rows.zero_point))
        return in_dtype(fake_quantize(wide, scale, zero_point, rows.levels), x.dtype)
