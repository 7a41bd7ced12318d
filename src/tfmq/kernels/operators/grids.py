"""Grids of an operator's input: the table row of each of its rows, spread over its channels."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Codes travel as signed bytes, `q - OFFSET`.
OFFSET = 128


def rows_of(table: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """Return the values of `table` `[S, G]` for an `x` `[A, ..., C]` whose rows divide into `len(index)`
    runs: `[R or A, ..., G]`, to broadcast.

    Runs are whole samples, or single rows of `x`.

    Raises:
        ValueError: the rows do not divide so.
    """
    found, rows = table[index], x.numel() // max(1, x.shape[-1])
    if len(index) == 1:
        return found.reshape([1] * (x.ndim - 1) + [-1])
    if len(index) == rows:
        return found.reshape(*x.shape[:-1], -1)
    if x.shape[0] % len(index):
        raise ValueError(f"{x.shape[0]} samples do not divide into {len(index)} rows of a grid")
    found = found.repeat_interleave(x.shape[0] // len(index), dim=0)
    return found.reshape(-1, *[1] * (x.ndim - 2), table.shape[1])


def spread(values: Tensor, segments: Sequence[int]) -> Tensor:
    """Return `[..., G]` values for each channel `[..., C]`, or as they are where one serves every channel."""
    return (
        torch.cat(
            [values[..., g : g + 1].expand(*values.shape[:-1], w) for g, w in enumerate(segments)], dim=-1
        )
        if segments
        else values
    )


def widths(segments: Sequence[int], channels: int) -> tuple[int, ...]:
    """Return the segments' widths, one of all channels where there are none."""
    return tuple(segments) or (channels,)
