"""Codes times integer weights on a GPU: one implicit matrix product for linear layers and convolutions, int8
or four bits unpacked in registers.

A convolution reads codes that are padded already, so the address of a product's input is the address of its
window plus that of the tap: nothing is masked inside of the image, and the zero-point's term is the same for
every output. Products of a segment run over taps and channels in one loop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tfmq.kernels.gpu.blocks import activated
from tfmq.kernels.gpu.tiles import Tile, chosen
from tfmq.kernels.operators.grids import widths
from tfmq.kernels.operators.multiply import output_size

MAX_SEGMENTS = 4


@triton.jit
def program_place(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Return the row and column of this program's block; `GROUP` rows of blocks walk the columns together."""
    number = tl.program_id(0)
    high, wide = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = number // (GROUP * wide) * GROUP
    size = tl.minimum(high - first, GROUP)
    return first + number % (GROUP * wide) % size, number % (GROUP * wide) // size


@triton.jit
def segment_sum(
    acc,
    inputs,
    base,
    weight,
    rows,
    weight_zero,
    begin,
    weight_begin,
    width,
    length,
    tap_width,
    XC,
    XWC,
    DH,
    DW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    NIBBLES: tl.constexpr,
    BK: tl.constexpr,
):
    """Return `acc` plus the products of one segment: `inputs + base` `[M, 1]` by the weight's `rows` `[1,
    N]`.

    A tap of a weight row takes `tap_width` bytes, `length` of them this segment's. Bytes of four-bit codes
    meet two blocks of the input, `length` channels apart.
    """
    blocks = tl.cdiv(length, BK)
    for number in range(0, KH * KW * blocks):
        tap = number // blocks
        k = (number % blocks) * BK + tl.arange(0, BK)
        inside = k < length
        place = inputs + base + ((tap // KW) * DH * XWC + (tap % KW) * DW * XC + begin + k)[None, :]
        a = tl.load(place, mask=inside[None, :], other=0)
        b = tl.load(
            weight + rows + (tap * tap_width + weight_begin + k)[:, None], mask=inside[:, None], other=0
        )
        if NIBBLES:
            # Mask the place behind an odd segment: it holds another segment's input, or nothing.
            beyond = tl.load(place + length, mask=(k + length < width)[None, :], other=0)
            low = ((b & 15).to(tl.int8) - weight_zero).to(a.dtype)
            high = ((b >> 4).to(tl.int8) - weight_zero).to(a.dtype)
            acc = tl.dot(a, low, acc, input_precision="ieee", out_dtype=acc.dtype)
            acc = tl.dot(beyond, high, acc, input_precision="ieee", out_dtype=acc.dtype)
        else:
            acc = tl.dot(a, b.to(a.dtype), acc, input_precision="ieee", out_dtype=acc.dtype)
    return acc


@triton.jit
def multiply(
    inputs,
    weight,
    out,
    scale,
    zero,
    index,
    weight_zero,
    weight_scale,
    sums,
    bias,
    residual,
    M,
    N,
    XC,
    RUN,
    W0,
    W1,
    W2,
    W3,
    L0,
    L1,
    L2,
    L3,
    TAP,
    OW,
    OHW,
    XWC,
    XHWC,
    SH,
    SW,
    DH,
    DW,
    KH: tl.constexpr,
    KW: tl.constexpr,
    IMAGE: tl.constexpr,
    G: tl.constexpr,
    NIBBLES: tl.constexpr,
    INTEGER: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute one block of `linear_codes`, `convolution_codes` or, with `INTEGER` off, `linear_weight_only`.

    `M` rows of output, `RUN` of them to a row of the grid, read `XC` channels; images are `OHW` outputs, `OW`
    to a line, on inputs of `XHWC` bytes, `XWC` to a line. `W0` to `W3` are the segments' widths, `L0` to `L3`
    their bytes in one tap of a weight row, `TAP` the bytes of all.
    """
    row, column = program_place(M, N, BM, BN, GROUP)
    m = row * BM + tl.arange(0, BM)
    n = column * BN + tl.arange(0, BN)
    real_m, real_n = m < M, n < N
    m, n = tl.where(real_m, m, 0), tl.where(real_n, n, 0)
    if IMAGE:
        pixel = m % OHW
        base = (m // OHW).to(tl.int64) * XHWC + (pixel // OW) * SH * XWC + (pixel % OW) * SW * XC
    else:
        base = m.to(tl.int64) * XC
    rows = n.to(tl.int64) * (TAP * KH * KW)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    begin = 0
    weight_begin = 0
    for g in tl.static_range(G):
        width, length = W0, L0
        if g == 1:
            width, length = W1, L1
        elif g == 2:
            width, length = W2, L2
        elif g == 3:
            width, length = W3, L3
        weight_zeros = None
        if NIBBLES:
            weight_zeros = tl.load(weight_zero + n * G + g)[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.int32 if INTEGER else tl.float32)
        acc = segment_sum(
            acc,
            inputs,
            base[:, None],
            weight,
            rows[None, :],
            weight_zeros,
            begin,
            weight_begin,
            width,
            length,
            TAP,
            XC,
            XWC,
            DH,
            DW,
            KH,
            KW,
            NIBBLES,
            BK,
        )
        factors = tl.load(weight_scale + n * G + g)[None, :]
        if INTEGER:
            step = tl.load(index + m // RUN) * G + g
            shift = tl.load(zero + step).to(tl.int32) - 128
            acc -= shift[:, None] * tl.load(sums + n * G + g)[None, :]
            partial = acc.to(tl.float32) * tl.load(scale + step)[:, None] * factors
        else:
            partial = acc * factors
        if g == 0 and bias is not None:
            partial += tl.load(bias + n)[None, :]
        total = partial if g == 0 else total + partial
        begin += width
        weight_begin += length
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    real = real_m[:, None] & real_n[None, :]
    total = activated(total, ACTIVATION)
    if residual is not None:
        total += tl.load(residual + place, mask=real, other=0.0).to(tl.float32)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=real)


def launcher(arguments: Sequence[Any], rows: int, columns: int, **constants: Any) -> Callable[[Tile], None]:
    """Return what runs the kernel on a grid of tiles.

    Multiplications and additions are not fused: the reference rounds after each.
    """

    def launch(tile: Tile) -> None:
        grid = (triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n),)
        blocks = {"BM": tile.m, "BN": tile.n, "BK": tile.k, "GROUP": tile.group}
        multiply[grid](
            *arguments,
            **constants,
            **blocks,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=False,
        )

    return launch


def _run(
    kernel: str, launch: Callable[[Tile], None], rows: int, rest: tuple[int, ...], tile: Tile | None
) -> None:
    if rows:
        launch(chosen(kernel, rows, rest, launch) if tile is None else tile)


def _lengths(segments: Sequence[int], channels: int, weight_zero: Tensor | None) -> list[int]:
    """Return the widths of the segments and their bytes in a weight row: sizes that 16 divides are told to
    the compiler, so they are arguments.
    """
    sizes = widths(segments, channels)
    rest = [0] * (MAX_SEGMENTS - len(sizes))
    return [*sizes, *rest, *((size if weight_zero is None else (size + 1) // 2) for size in sizes), *rest]


def _plain(inputs: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return inputs.contiguous(), None if residual is None else residual.contiguous()


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
    tile: Tile | None = None,
) -> Tensor:
    """Compute `tfmq::linear_codes`."""
    codes, residual = _plain(codes, residual)
    channels, columns = codes.shape[-1], weight.shape[0]
    rows = codes.numel() // max(1, channels)
    out = codes.new_empty((*codes.shape[:-1], columns), dtype=dtype)
    groups = max(1, len(segments))
    tensors = (codes, weight, out, scale, zero_point, index, weight_zero, weight_scale, sums, bias, residual)
    sizes = (
        rows,
        columns,
        channels,
        rows // len(index),
        *_lengths(segments, channels, weight_zero),
        weight.shape[1],
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
    )
    kind = {
        "KH": 1,
        "KW": 1,
        "IMAGE": False,
        "G": groups,
        "NIBBLES": weight_zero is not None,
        "INTEGER": True,
        "ACTIVATION": activation,
    }
    name = "linear w4a8" if weight_zero is not None else "linear w8a8"
    _run(name, launcher((*tensors, *sizes), rows, columns, **kind), rows, (columns, channels, groups), tile)
    return out


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
    tile: Tile | None = None,
) -> Tensor:
    """Compute `tfmq::convolution_codes`."""
    codes, residual = _plain(codes, residual)
    batch, height, width, channels = codes.shape
    columns, kernel_height, kernel_width, tap = weight.shape
    down, across = output_size(codes, weight, stride, dilation)
    out = codes.new_empty((batch, down, across, columns), dtype=dtype)
    rows, groups = batch * down * across, max(1, len(segments))
    tensors = (codes, weight, out, scale, zero_point, index, weight_zero, weight_scale, sums, bias, residual)
    line = width * channels
    places = (across, down * across, line, height * line, *stride, *dilation)
    sizes = (
        rows,
        columns,
        channels,
        rows // len(index),
        *_lengths(segments, channels, weight_zero),
        tap,
        *places,
    )
    kind = {
        "IMAGE": True,
        "G": groups,
        "NIBBLES": weight_zero is not None,
        "INTEGER": True,
        "ACTIVATION": activation,
    }
    launch = launcher((*tensors, *sizes), rows, columns, KH=kernel_height, KW=kernel_width, **kind)
    name = "convolution w4a8" if weight_zero is not None else "convolution w8a8"
    _run(name, launch, rows, (columns, channels, groups, kernel_height, kernel_width, *stride), tile)
    return out


def linear_weight_only(
    x: Tensor,
    segments: Sequence[int],
    weight: Tensor,
    weight_zero: Tensor | None,
    weight_scale: Tensor,
    bias: Tensor | None,
    tile: Tile | None = None,
) -> Tensor:
    """Compute `tfmq::linear_weight_only`."""
    x = x.contiguous()
    channels, columns = x.shape[-1], weight.shape[0]
    rows, groups = x.numel() // max(1, channels), max(1, len(segments))
    out = x.new_empty((*x.shape[:-1], columns))
    tensors = (x, weight, out, None, None, None, weight_zero, weight_scale, None, bias, None)
    sizes = (
        rows,
        columns,
        channels,
        1,
        *_lengths(segments, channels, weight_zero),
        weight.shape[1],
        1,
        1,
        1,
        1,
        1,
        1,
        1,
        1,
    )
    kind = {
        "KH": 1,
        "KW": 1,
        "IMAGE": False,
        "G": groups,
        "NIBBLES": weight_zero is not None,
        "INTEGER": False,
        "ACTIVATION": "",
    }
    name = f"weight-only {'w4' if weight_zero is not None else 'w8'} {x.dtype}"
    _run(name, launcher((*tensors, *sizes), rows, columns, **kind), rows, (columns, channels, groups), tile)
    return out
