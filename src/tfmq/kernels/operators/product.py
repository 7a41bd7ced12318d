"""An attention product in integers: both operands on grids of their own, the product of their codes rescaled
once.
"""

import torch
from torch import Tensor

from tfmq.numerics.affine import quantize


def centred(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Return `q - z` of `x` in float32, with one row of the grid or one for each sample."""
    shape = (-1, *[1] * (x.ndim - 1))
    zero = zero_point.float().reshape(shape)
    return quantize(x.float(), scale.reshape(shape), zero, levels).sub_(zero)


def rescaled(sums: Tensor, left_scale: Tensor, right_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return sums times both scales, left first, in `dtype`."""
    shape = (-1, *[1] * (sums.ndim - 1))
    return (sums * left_scale.reshape(shape) * right_scale.reshape(shape)).to(dtype)


@torch.library.custom_op("tfmq::product_codes", mutates_args=())
def product_codes(
    left: Tensor,
    left_scale: Tensor,
    left_zero: Tensor,
    left_levels: int,
    right: Tensor,
    right_scale: Tensor,
    right_zero: Tensor,
    right_levels: int,
) -> Tensor:
    """Return `left_hat @ right_hat` in the dtype of `left`; scales and zero-points are one for each sample,
    or one.

    Sums of integers are exact below 2**24, which 258 products of the largest codes stay below.
    """
    sums = centred(left, left_scale, left_zero, left_levels) @ centred(
        right, right_scale, right_zero, right_levels
    )
    return rescaled(sums, left_scale, right_scale, left.dtype).contiguous()


@product_codes.register_fake
def _(
    left: Tensor,
    left_scale: Tensor,
    left_zero: Tensor,
    left_levels: int,
    right: Tensor,
    right_scale: Tensor,
    right_zero: Tensor,
    right_levels: int,
) -> Tensor:
    return left.new_empty((*left.shape[:-1], right.shape[-1]))
