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
from torch import Tensor

from tfmq.kernels.gpu.product_programs import multiply
from tfmq.kernels.gpu.tiles import Tile, chosen
from tfmq.kernels.operators.grids import widths
from tfmq.kernels.operators.multiply import output_size

# Largest number of segments of an input that the program takes.
MAX_SEGMENTS = 4
# What a linear layer, which has one tap and no places, gives for the sizes `OW` to `DW`, and for the window.
POINT = (1,) * 8
LINEAR = {"KH": 1, "KW": 1, "IMAGE": False}


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


def _kind(
    groups: int, weight_zero: Tensor | None, activation: str, *, integer: bool = True
) -> dict[str, Any]:
    """Return the options that tell kernels of any window apart."""
    nibbles = weight_zero is not None
    return {"G": groups, "NIBBLES": nibbles, "INTEGER": integer, "ACTIVATION": activation}


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
    counts = rows, columns, channels, rows // len(index)
    sizes = (*counts, *_lengths(segments, channels, weight_zero), weight.shape[1], *POINT)
    kind = {**LINEAR, **_kind(groups, weight_zero, activation)}
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
    counts = rows, columns, channels, rows // len(index)
    sizes = (*counts, *_lengths(segments, channels, weight_zero), tap, *places)
    window = {"KH": kernel_height, "KW": kernel_width, "IMAGE": True}
    launch = launcher((*tensors, *sizes), rows, columns, **window, **_kind(groups, weight_zero, activation))
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
    lengths = _lengths(segments, channels, weight_zero)
    sizes = (rows, columns, channels, 1, *lengths, weight.shape[1], *POINT)
    kind = {**LINEAR, **_kind(groups, weight_zero, "", integer=False)}
    name = f"weight-only {'w4' if weight_zero is not None else 'w8'} {x.dtype}"
    _run(name, launcher((*tensors, *sizes), rows, columns, **kind), rows, (columns, channels, groups), tile)
    return out
