"""Codes times integer weights: linear layers and convolutions, scaled, with bias, activation function and
residual.

With `u` the codes, `z` the zero-point of a row and `v` the integer weight, segment by segment `g` of the
input channels:

    y = activation(sum over g of (sum u v - (z_g - 128) sum v) s_g s_w,og + bias_o) + residual

The sums are int32, the rest float32, multiplied from left to right, the bias added to the first segment, as
`LayerKernel` specifies: with neither activation function nor residual every bit is the reference's. Weights
are int8, or uint8 with `weight_zero` int8 `[N, G]`: two four-bit codes in a byte (see `weights`). `sums`
int32 `[N, G]` holds `sum v`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq.kernels.operators.epilogue import finished
from tfmq.kernels.operators.grids import OFFSET, rows_of, widths
from tfmq.kernels.operators.weights import integers_of

Multiply = Callable[[Tensor, Tensor], Tensor]


def _total(
    codes: Tensor,
    grid: tuple[Tensor, Tensor, Tensor],
    segments: Sequence[int],
    values: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    multiply: Multiply,
) -> Tensor:
    """Return the sum of the segments in float32 `[..., N]`; products are taken in float64, which is exact
    below 2**53.
    """
    sizes = widths(segments, codes.shape[-1])
    partials = []
    for g, (u, v) in enumerate(zip(codes.split(sizes, dim=-1), values.split(sizes, dim=-1), strict=True)):
        sums = v.double().flatten(1).sum(dim=1)
        product = multiply(u.double(), v.double())
        s, z = (rows_of(table, grid[2], product)[..., g : g + 1] for table in (grid[0], grid[1].float()))
        partial = (product - (z.double() - OFFSET) * sums).float() * s * scale[:, g]
        partials.append(partial if bias is None or g else partial + bias)
    total = partials[0]
    for partial in partials[1:]:
        total = total + partial
    return total


@torch.library.custom_op("tfmq::linear_codes", mutates_args=())
def linear_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the layer's output `[..., N]` for codes `[..., C]` and a weight `[N, C]`."""
    values = integers_of(weight, weight_zero, segments, codes.shape[-1])
    total = _total(
        codes, (scale, zero_point, index), segments, values, weight_scale, bias, lambda u, v: u @ v.mT
    )
    return finished(total, activation, residual, dtype).contiguous()


@linear_codes.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)


def output_size(
    codes: Tensor, weight: Tensor, stride: Sequence[int], dilation: Sequence[int]
) -> tuple[int, int]:
    """Return height and width of a convolution's output for padded codes `[B, H, W, C]` and a weight `[N, KH,
    KW, C]`.
    """
    pairs = zip(codes.shape[1:3], weight.shape[1:3], stride, dilation, strict=True)
    height, width = ((size - d * (kernel - 1) - 1) // step + 1 for size, kernel, step, d in pairs)
    return height, width


@torch.library.custom_op("tfmq::convolution_codes", mutates_args=())
def convolution_codes(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Return the layer's output `[B, OH, OW, N]` for codes `[B, H, W, C]` that are padded already and a
    weight `[N, KH, KW, C]`.
    """

    def multiply(u: Tensor, v: Tensor) -> Tensor:
        return F.conv2d(u.movedim(-1, 1), v.movedim(-1, 1), None, list(stride), 0, list(dilation)).movedim(
            1, -1
        )

    values = integers_of(weight, weight_zero, segments, codes.shape[-1])
    total = _total(codes, (scale, zero_point, index), segments, values, weight_scale, bias, multiply)
    return finished(total, activation, residual, dtype).contiguous()


@convolution_codes.register_fake
def _(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return codes.new_empty(
        (codes.shape[0], *output_size(codes, weight, stride, dilation), weight.shape[0]), dtype=dtype
    )


@torch.library.custom_op("tfmq::linear_weight_only", mutates_args=())
def linear_weight_only(
    x: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return `x @ (v s_w).T + bias` for floating-point `x` `[..., C]`, in its dtype; sums in float32, the
    scale of a segment behind its sum.
    """
    values = integers_of(weight, weight_zero, segments, x.shape[-1])
    sizes = widths(segments, x.shape[-1])
    total = torch.zeros(()) if bias is None else bias
    for g, (part, v) in enumerate(zip(x.split(sizes, dim=-1), values.split(sizes, dim=-1), strict=True)):
        total = total.to(x.device) + part.float() @ v.float().mT * weight_scale[:, g]
    return total.to(x.dtype).contiguous()


@linear_weight_only.register_fake
def _(
    x: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
