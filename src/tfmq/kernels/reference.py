"""The exact integer arithmetic of a layer and of an attention product, on any device: slow, and the oracle of
every other kernel.

Products and sums of integers are computed in float64, which holds every integer up to 2**53: below the int32
bound that is checked first, each partial sum is exact in whatever order it is taken. The accumulators are
then int32 as on an integer unit.
"""

import torch
from torch import Tensor

from tfmq.kernels.kernel import ACCUMULATOR, IntegerWeight, Rows, channels, column, combined
from tfmq.numerics.affine import quantize


def integers(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Return `q - z` of `x` on the grid of each sample or token (`scale`, `zero_point` `[B or 1]` or `[B,
    ...]`), as float64 integers.
    """
    scale, zero_point = column(scale, x.ndim), column(zero_point, x.ndim).float()
    return (quantize(x.float(), scale, zero_point, levels) - zero_point).double()


class ReferenceKernel:
    """A layer in exact integers.

    Raises:
        ValueError: a weight whose sums could leave int32.
    """

    def __init__(self, weight: IntegerWeight, levels: int) -> None:
        if weight.peak(levels) > ACCUMULATOR:
            raise ValueError(f"sums of up to {weight.peak(levels)} do not fit into int32")
        self.weight = weight

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor:
        assert rows is not None
        operation, partials = self.weight.operation, []
        parts = zip(
            self.weight.split(x),
            rows.scale.unbind(-1),
            rows.zero_point.unbind(-1),
            self.weight.parts(),
            strict=True,
        )
        for part, scale, zero_point, (values, weight_scale) in parts:
            codes = integers(part, scale, zero_point, rows.levels)
            sums = operation(codes, values.double(), None).to(torch.int32)
            partials.append(sums.float() * column(scale, x.ndim) * channels(weight_scale, operation, x.ndim))
        total = combined(partials, self.weight.bias, operation)
        # Lay the output out as integer libraries do, so that later sums over it have the same order.
        return operation.arranged(total).to(x.dtype)


def reference_product(left: Tensor, left_rows: Rows, right: Tensor, right_rows: Rows) -> Tensor:
    """Return `left_hat @ right_hat` in exact integers, rescaled once; the dtype is that of `left`."""
    a = integers(left, left_rows.scale[:, 0], left_rows.zero_point[:, 0], left_rows.levels)
    b = integers(right, right_rows.scale[:, 0], right_rows.zero_point[:, 0], right_rows.levels)
    sums = torch.matmul(a, b).to(torch.int32)
    return (
        sums.float() * column(left_rows.scale[:, 0], sums.ndim) * column(right_rows.scale[:, 0], sums.ndim)
    ).to(left.dtype)
