"""Random integer layers, drawn so that every kernel is tested on the same kinds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.numerics.operations import Convolution, Linear, TransposedConvolution

CHANNELS = 4


class LayerCase(NamedTuple):
    """A layer, an input of it, and the grid of that input."""

    weight: IntegerWeight
    x: Tensor
    rows: Rows


def draw_grid(draw: st.DrawFn, *, rows: tuple[tuple[int, ...], ...], segments: int) -> Rows:
    levels, shape = 2 ** draw(st.integers(2, 8)), (*draw(st.sampled_from(rows)), segments)
    return Rows(0.001 + torch.rand(shape), torch.randint(levels, shape).to(torch.uint8), levels)


def spread(values: Tensor, segments: tuple[int, ...], axis: int, ndim: int) -> Tensor:
    """Return `[B or 1, G]` values, or those of tokens `[B, ..., G]`, for each channel of an input of `ndim`
    axes.
    """
    wide = values.float().repeat_interleave(torch.tensor(segments or (CHANNELS,)), dim=-1)
    if wide.ndim == ndim:
        return wide
    shape = [1] * ndim
    shape[0], shape[axis] = wide.shape
    return wide.reshape(shape)


@st.composite
def layer_case(
    draw: st.DrawFn, *, offset: Callable[[tuple[int, ...]], Tensor], narrow: bool = False
) -> LayerCase:
    """A layer of 2- to 8-bit weights; its input lies `offset` steps of the grid away from codes inside and
    outside of the range.

    `narrow` keeps to what oneDNN computes: signed bytes, at most two spatial axes.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    axes, batch = draw(st.integers(0, 2 if narrow else 3)), draw(st.integers(1, 3))
    segments = draw(st.sampled_from([(), (1, 3), (2, 1, 1)]))
    groups = 1 if segments or not axes else draw(st.sampled_from([1, 2]))
    symmetric, bits = draw(st.booleans()), draw(st.integers(2, 8))
    bits = bits if symmetric or not narrow else min(bits, 7)
    if axes:
        stride, padding, dilation = (
            tuple(draw(st.integers(low, high)) for _ in range(axes)) for low, high in ((1, 2), (0, 2), (1, 2))
        )
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(axes))
        operation: Any = Convolution(stride, padding, dilation, groups)
        size = 6
        if draw(st.booleans()):
            more = tuple(draw(st.integers(0, max(pair) - 1)) for pair in zip(stride, dilation, strict=True))
            operation, size = TransposedConvolution(stride, padding, more, dilation, groups), 5
        shape: tuple[int, ...] = (batch, CHANNELS, *[size] * axes)
    else:
        operation, kernel = Linear(), ()
        shape = (batch, *draw(st.sampled_from([(), (5,), (2, 3)])), CHANNELS)
    codes = torch.randint(2**bits, (6, CHANNELS // groups, *kernel))
    columns = max(1, len(segments))
    zero_point = (
        torch.full((6, columns), 2 ** (bits - 1)) if symmetric else torch.randint(2**bits, (6, columns))
    )
    wide_zero = zero_point.repeat_interleave(torch.tensor(segments or (CHANNELS // groups,)), dim=1).reshape(
        6, -1, *[1] * len(kernel)
    )
    bias = torch.randn(6) if draw(st.booleans()) else None
    weight = IntegerWeight(
        operation, (codes - wide_zero).to(torch.int16), 0.001 + torch.rand(6, columns), bias, segments
    )
    # A grid for all, for each sample, and where channels come last for each token.
    rows = draw_grid(draw, rows=((1,), (batch,), shape[:-1] if not axes else (batch,)), segments=columns)
    scale, zero = (
        spread(values, segments, operation.channel_axis % len(shape), len(shape))
        for values in (rows.scale, rows.zero_point)
    )
    x = (torch.randint(-20, rows.levels + 20, shape) + offset(shape) - zero) * scale
    return LayerCase(weight, x, rows)


@pytest.fixture(scope="session")
def layer_cases() -> Callable[..., Any]:
    """Return the strategy of layers."""
    return layer_case
