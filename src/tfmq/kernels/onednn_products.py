"""Products of two activations by oneDNN, batched and exact."""

import math

import torch
from torch import Tensor

from tfmq.kernels.kernel import Rows, column
from tfmq.kernels.onednn import MIDDLE, multipliable, multiplies
from tfmq.numerics.affine import quantize

# A batched product of a captured graph is computed one by one if it has at most UNROLLED products of at least
# LARGE multiplications each.
UNROLLED, LARGE = 16, 2**21


def product(left: Tensor, left_rows: Rows, right: Tensor, right_rows: Rows) -> Tensor:
    """Return `left_hat @ right_hat` through integers held in float32, exact while sums stay below 2**24; the
    dtype is that of `left`.

    torch has no batched product of unsigned operands; at the sizes of attention in a denoiser, a float
    product of integers loses nothing. In a captured graph large matrices are multiplied as u8 and s8, one by
    one.
    """
    grids = [
        (
            x.float(),
            column(rows.scale[:, 0], x.ndim),
            column(rows.zero_point[:, 0], x.ndim).float(),
            rows.levels,
        )
        for x, rows in ((left, left_rows), (right, right_rows))
    ]
    if (
        torch.compiler.is_compiling()
        and multipliable(left.shape[-1], left_rows, right_rows)
        and _worth_unrolling(left, right)
    ):
        sums = _unrolled(*(quantize(*grid) for grid in grids), *(grid[2] for grid in grids))
    else:
        operands = [quantize(*grid).sub_(grid[2]) for grid in grids]
        sums = operands[0] @ operands[1]
    return sums.mul_(grids[0][1]).mul_(grids[1][1]).to(left.dtype)


def _worth_unrolling(left: Tensor, right: Tensor) -> bool:
    """Whether products are few and large, so that integers save more than calling them costs."""
    many = math.prod(left.shape[:-2])
    return (
        left.ndim > 2
        and left.shape[:-2] == right.shape[:-2]
        and many <= UNROLLED
        and left.shape[-2] * left.shape[-1] * right.shape[-1] >= LARGE
        and multiplies()
    )


def _unrolled(left: Tensor, right: Tensor, left_zero: Tensor, right_zero: Tensor) -> Tensor:
    """Return `(left - left_zero) @ (right - right_zero)` of codes in float32, by integer products of each
    matrix.

    With `r = right - 128`, which is s8, and `d = right_zero - 128`, it is `sum l r - d sum l - z_l (sum r - K
    d)`.
    """
    signed, shift = right - MIDDLE, right_zero - MIDDLE
    codes, values = left.to(torch.uint8).flatten(0, -3), signed.to(torch.int8).flatten(0, -3)
    sums = (
        torch.stack([torch._int_mm(a, b) for a, b in zip(codes.unbind(), values.unbind(), strict=True)])
        .unflatten(0, left.shape[:-2])
        .float()
    )
    columns = signed.sum(dim=-2, keepdim=True) - left.shape[-1] * shift
    return sums - shift * left.sum(dim=-1, keepdim=True) - left_zero * columns
