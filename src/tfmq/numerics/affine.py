"""Affine quantization: `code = clamp(round(x / scale) + zero_point)`, `x_hat = (code - zero_point) * scale`.

`scale` and `zero_point` broadcast against `x`. The quotient is `x * (1 / scale)` in the precision of `x`, as
in `torch.fake_quantize_per_channel_affine`, and rounding is half to even.
"""

from typing import Any

import torch
from torch import Tensor


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `x` in a dtype; where it has that already, a graph has no node for it."""
    return x if x.dtype == dtype else x.to(dtype)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | int, levels: int) -> Tensor:
    """Return the codes of `x` as a float tensor of integers in `[0, levels - 1]`."""
    return (x * scale.reciprocal()).round_().add_(zero_point).clamp_(0, levels - 1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return the values of `codes`, in the dtype of `scale`."""
    return (codes.to(scale.dtype) - zero_point) * scale


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; the gradient is the identity inside the grid's range and zero outside
    (straight-through).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
        """Return `x` on its grid; note which values lie within it."""
        codes = (x * scale.reciprocal()).round_().add_(zero_point)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward((codes >= 0) & (codes <= levels - 1))
        return codes.clamp_(0, levels - 1).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Pass the gradient on where a value lies within its grid."""
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Tensor:
    """Return `x` on the grid, in float; differentiable in `x` by the straight-through estimator."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _FakeQuantize.apply(x, scale, zero_point, levels)
    return quantize(x, scale, zero_point, levels).sub_(zero_point).mul_(scale)
