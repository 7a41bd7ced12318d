"""Random operands of the operators, drawn so that Triton's kernels meet every kind: the interpreter takes a
second for what a GPU does in no time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels.operators.weights import half_packed, integers_of

CHANNELS = (5, 13, 16)
STEPS = 3


class Grid(NamedTuple):
    """A table of grids, the rows of it that count, and the segments of the channels."""

    scale: Tensor
    zero_point: Tensor
    index: Tensor
    segments: tuple[int, ...]


class Weight(NamedTuple):
    """An integer weight in device memory, as the operators take it."""

    weight: Tensor
    weight_zero: Tensor | None
    weight_scale: Tensor
    sums: Tensor
    bias: Tensor | None


@st.composite
def segments_of(draw: st.DrawFn, channels: int) -> tuple[int, ...]:
    """No segments, or two to four that add up to `channels`."""
    count = draw(st.sampled_from([0, 0, 2, 3, 4]))
    cuts = (
        sorted(
            draw(st.lists(st.integers(1, channels - 1), min_size=count - 1, max_size=count - 1, unique=True))
        )
        if count
        else []
    )
    return (
        tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, channels], strict=True)) if count else ()
    )


@st.composite
def grid(draw: st.DrawFn, *, channels: int, batch: int, levels: int = 256, rows: int | None = None) -> Grid:
    """Grids for `rows` rows of `batch` samples: one for all, one for each sample, or one for each row."""
    segments = draw(segments_of(channels))
    counts = draw(st.sampled_from([1, batch, *([rows] if rows else [])]))
    shape = (STEPS, max(1, len(segments)))
    scale, zero = 0.001 + 0.1 * torch.rand(shape), torch.randint(levels, shape).to(torch.uint8)
    return Grid(scale, zero, torch.randint(STEPS, (counts,)), segments)


@st.composite
def weight(draw: st.DrawFn, *, shape: tuple[int, ...], segments: tuple[int, ...], nibbles: bool) -> Weight:
    """A weight of `shape` `[N, ..., C]` in bytes or in nibbles, with or without a bias."""
    groups, channels = max(1, len(segments)), shape[-1]
    zero = torch.randint(-8, 16, (shape[0], groups)).to(torch.int8) if nibbles else None
    values = (
        half_packed(torch.randint(16, shape), segments)
        if nibbles
        else torch.randint(-128, 128, shape).to(torch.int8)
    )
    parts = integers_of(values, zero, segments, channels).split(segments or (channels,), dim=-1)
    sums = torch.stack([part.flatten(1).sum(dim=1) for part in parts], dim=1).to(torch.int32)
    bias = torch.randn(shape[0]) if draw(st.booleans()) else None
    return Weight(values, zero, 0.001 + torch.rand(shape[0], groups), sums, bias)


@pytest.fixture(scope="session")
def draw_grid() -> Callable[..., Any]:
    """Return the strategy of grids."""
    return grid


@pytest.fixture(scope="session")
def draw_weight() -> Callable[..., Any]:
    """Return the strategy of weights."""
    return weight
