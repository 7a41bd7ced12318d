"""Floating point to codes: on a table of grids, padded for a convolution, or on a grid for each token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq.kernels.operators.grids import OFFSET, rows_of, spread
from tfmq.numerics.affine import quantize


def padded_shape(shape: Sequence[int], padding: Sequence[int]) -> list[int]:
    """Return the shape of images `[B, H, W, C]` with `padding` (top, left, bottom, right), or any shape
    without.
    """
    if not padding:
        return list(shape)
    batch, height, width, channels = shape
    top, left, bottom, right = padding
    return [batch, height + top + bottom, width + left + right, channels]


def codes_of(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    """Define `quantize_codes`; other definitions that end in codes use it."""
    s, z = (spread(rows_of(values, index, x), segments) for values in (scale, zero_point.float()))
    codes = (quantize(x.float(), s, z, levels) - OFFSET).to(torch.int8)
    if not padding:
        return codes.contiguous()
    top, left, bottom, right = padding
    border = (z - OFFSET).to(torch.int8).expand(x.shape[0], 1, 1, x.shape[-1])
    out = border.expand(padded_shape(x.shape, padding)).contiguous()
    out[:, top : out.shape[1] - bottom, left : out.shape[2] - right] = codes
    return out


@torch.library.custom_op("tfmq::quantize_codes", mutates_args=())
def quantize_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    """Return `clamp(round(x / s) + z, 0, levels - 1) - 128` of `x` `[..., C]`, int8.

    Images `[B, H, W, C]` may be padded by `padding` (top, left, bottom, right), with the code of zero: `z -
    128` of their sample and segment.
    """
    return codes_of(x, scale, zero_point, index, segments, levels, padding)


@quantize_codes.register_fake
def _(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    return x.new_empty(padded_shape(x.shape, padding), dtype=torch.int8)


@torch.library.custom_op("tfmq::quantize_tokens", mutates_args=())
def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales `[M, 1]` of `x` `[..., C]`, each of its `M` rows on a symmetric grid of its
    own: `s = max|x| / 127`.

    Dynamic quantization, in no recipe of TFMQ. The codes are multiplied with zero-point 128 (0 in signed
    bytes) and `index = arange(M)`.
    """
    peak = x.float().abs().amax(dim=-1, keepdim=True)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    codes = torch.round(x.float() * scale.reciprocal()).clamp(-127, 127).to(torch.int8)
    return codes.contiguous(), scale.reshape(-1, 1)


@quantize_tokens.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((rows, 1), dtype=torch.float32)
