"""Floating point to codes on a GPU: one pass that reads, quantizes and pads; and the variant with a grid for
each token.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfmq.kernels.gpu.blocks import ROUNDER, coded, grid_of
from tfmq.kernels.operators.grids import widths
from tfmq.kernels.operators.quantize import padded_shape

# Number of values that one program handles.
BLOCK = 2048


@triton.jit
def source_row(
    row: tl.tensor,
    HEIGHT: tl.tensor,
    WIDTH: tl.tensor,
    OHEIGHT: tl.tensor,
    OWIDTH: tl.tensor,
    TOP: tl.tensor,
    LEFT: tl.tensor,
    PADDED: tl.constexpr,
):
    """Return the input row behind each row of a padded output, and whether there is one."""
    if PADDED:
        across = row % OWIDTH - LEFT
        down = row // OWIDTH % OHEIGHT - TOP
        real = (across >= 0) & (across < WIDTH) & (down >= 0) & (down < HEIGHT)
        source = (row // (OWIDTH * OHEIGHT) * HEIGHT + down) * WIDTH + across
    else:
        real = row >= 0
        source = row
    return source, real


@triton.jit
def quantize_rows(
    x: tl.tensor, out: tl.tensor, scale: tl.tensor, zero: tl.tensor, index: tl.tensor,
    ROWS: tl.tensor, C: tl.tensor, RUN: tl.tensor, W0: tl.tensor, W1: tl.tensor, W2: tl.tensor,
    HEIGHT: tl.tensor, WIDTH: tl.tensor, OHEIGHT: tl.tensor, OWIDTH: tl.tensor,
    TOP: tl.tensor, LEFT: tl.tensor,
    G: tl.constexpr, LEVELS: tl.constexpr, PADDED: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Write the codes of a block of rows and channels; the border gets the code of zero."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    real = (row < ROWS)[:, None] & (channel < C)[None, :]
    step = tl.load(index + row // RUN, mask=row < ROWS, other=0)
    s, z = grid_of(scale, zero, step, tl.where(channel < C, channel, 0), W0, W1, W2, G)
    source, inner = source_row(row, HEIGHT, WIDTH, OHEIGHT, OWIDTH, TOP, LEFT, PADDED)
    value = tl.load(
        x + source.to(tl.int64)[:, None] * C + channel[None, :], mask=real & inner[:, None], other=0.0
    ).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * C + channel[None, :], coded(value, s, z, LEVELS), mask=real)


@triton.jit
def quantize_each_row(x: tl.tensor, out: tl.tensor, scale: tl.tensor, C: tl.tensor, BC: tl.constexpr):
    """Write the codes of one row on its own symmetric grid, and its scale."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BC)
    real = channel < C
    value = tl.load(x + row * C + channel, mask=real, other=0.0).to(tl.float32)
    peak = tl.max(tl.abs(value), axis=0)
    s = tl.where(peak > 0, tl.div_rn(peak, 127.0), 1.0)
    scaled = tl.minimum(tl.maximum(value * tl.div_rn(1.0, s), -127.0), 127.0)
    tl.store(out + row * C + channel, ((scaled + ROUNDER) - ROUNDER).to(tl.int32).to(tl.int8), mask=real)
    tl.store(scale + row, s)


def blocks(rows: int, channels: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid of programs over rows and channels, and the blocks' sizes."""
    wide = min(triton.next_power_of_2(channels), 256)
    high = max(1, min(BLOCK // wide, triton.next_power_of_2(rows)))
    return (triton.cdiv(rows, high), triton.cdiv(channels, wide)), {"BR": high, "BC": wide}


def placement(x: Tensor, padding: Sequence[int]) -> tuple[list[int], dict[str, Any]]:
    """Return the sizes of images and border that `source_row` takes, and whether there is a border."""
    if not any(padding):
        return [1, 1, 1, 1, 0, 0], {"PADDED": False}
    shape = padded_shape(x.shape, padding)
    return [x.shape[1], x.shape[2], shape[1], shape[2], padding[0], padding[1]], {"PADDED": True}


def quantize_codes(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    index: Tensor,
    segments: Sequence[int],
    levels: int,
    padding: Sequence[int],
) -> Tensor:
    """Compute `tfmq::quantize_codes`."""
    x = x.contiguous()
    out = torch.empty(padded_shape(x.shape, padding), dtype=torch.int8, device=x.device)
    channels = x.shape[-1]
    rows = out.numel() // max(1, channels)
    if not rows:
        return out
    places, padded = placement(x, padding)
    edges = [*widths(segments, channels), 0, 0][:3]
    grid, sizes = blocks(rows, channels)
    constants = {"G": max(1, len(segments)), "LEVELS": levels, **padded, **sizes}
    quantize_rows[grid](
        x,
        out,
        scale,
        zero_point,
        index,
        rows,
        channels,
        rows // len(index),
        *edges,
        *places,
        **constants,
        enable_fp_fusion=False,
    )
    return out


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `tfmq::quantize_tokens`."""
    x = x.contiguous()
    channels = x.shape[-1]
    rows = x.numel() // max(1, channels)
    out = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if rows:
        quantize_each_row[(rows,)](
            x, out, scale, channels, BC=triton.next_power_of_2(channels), enable_fp_fusion=False
        )
    return out, scale
