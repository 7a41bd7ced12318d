"""What executes a layer: the contract, and the integer weight that it is made from."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from tfmq.numerics.operations import Operation
from tfmq.numerics.segments import split

# Largest sum that an int32 accumulator holds.
ACCUMULATOR = 2**31 - 1
# Number of integers that are summed at once.
CHUNK = 2**18


@dataclass(frozen=True)
class Rows:
    """The input grid of one call, of `levels` codes: tables `scales` float32 and `zero_points` uint8, `[S,
    G]`, and which rows of them count.

    `index` int64 `[B or 1]` is the row of each sample, or one for the whole batch; None where the tables are
    those rows already. `G` is the number of channel segments. A kernel that looks rows up itself reads the
    tables, any other `scale` and `zero_point`. Where each token has its own grid, the tables have the shape
    of the input `[B, ..., C]` with `G` in the place of `C`; linear layers alone read such rows.
    """

    scales: Tensor
    zero_points: Tensor
    levels: int
    index: Tensor | None = None

    @cached_property
    def scale(self) -> Tensor:
        """The scale of each sample or of all, float32 `[B or 1, G]`."""
        return self.looked_up(self.scales)

    @cached_property
    def zero_point(self) -> Tensor:
        """The zero-point of each sample or of all, uint8 `[B or 1, G]`."""
        return self.looked_up(self.zero_points)

    def looked_up(self, table: Tensor) -> Tensor:
        """Return the rows of `table` `[S, ...]` that count, so that a graph computes what depends on the
        table alone once and for all.
        """
        return table if self.index is None else table[self.index]


class LayerKernel(Protocol):
    """Computes `operation(x_hat, w_hat) + bias`, `x_hat` being `x` on the grid `rows`, in integers between
    quantizing and rescaling.

    With `q = clamp(round(x / s) + z, 0, levels - 1)` and the integer weight `v`, segment by segment `g` of
    the input channels:

        y = sum over g of (sum over i in g of (q_i - z_g) v_oi) s_g s_w,og + bias_o

    in float32, multiplying from left to right and adding the bias to the first segment. Zero padding pads
    with the code `z`. The output has the dtype of `x`. Without `rows` the input is not quantized and nothing
    is in integers but the weight at rest.
    """

    def __call__(self, x: Tensor, rows: Rows | None) -> Tensor: ...


@dataclass(frozen=True)
class IntegerWeight:
    """An integer weight `values` (int16, code minus zero-point) `[C_out, C_in, ...]` with `scale` `[C_out,
    G]` and the float32 bias `[C_out]`.
    """

    operation: Operation
    values: Tensor
    scale: Tensor
    bias: Tensor | None
    segments: tuple[int, ...] = ()

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the values and scale `[C_out]` of each input segment."""
        pieces = split(self.values, self.segments, axis=1)
        yield from zip(pieces, self.scale.unbind(dim=1), strict=True)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the input segments of `x`."""
        return split(x, self.segments, axis=self.operation.channel_axis)

    @property
    def narrow(self) -> bool:
        """Whether the values fit into eight signed bits."""
        return int(self.values.min()) >= -128 and int(self.values.max()) <= 127

    def peak(self, levels: int) -> int:
        """Return a bound of the accumulator's magnitude for inputs of `levels` codes."""
        # Take some rows at a time: a wide copy of the whole weight would decide the peak memory of the
        # process.
        rows = self.values.flatten(1).split(max(1, CHUNK // max(1, self.values[0].numel())))
        return max(int(part.abs().sum(dim=1, dtype=torch.int64).max()) for part in rows) * (levels - 1)


def column(values: Tensor, ndim: int) -> Tensor:
    """Return a value for each sample `[B or 1]`, or each token `[B, ...]`, so that it broadcasts against a
    tensor of `ndim` axes that begin so.
    """
    return values[(..., *[None] * (ndim - values.ndim))]


def channels(values: Tensor, operation: Operation, ndim: int) -> Tensor:
    """Return values for each channel `[..., C]` so that they broadcast against the output `[B, ...]` of
    `operation` with `ndim` axes.
    """
    if values.ndim == ndim:
        return values
    shape = [values.shape[0] if values.ndim == 2 else 1] + [1] * (ndim - 1)
    # Not its number: traced, that would be four nodes.
    shape[operation.channel_axis % ndim] = -1
    return values.reshape(shape)


def combined(partials: Sequence[Tensor], bias: Tensor | None, operation: Operation) -> Tensor:
    """Return the sum of the segments' outputs, the bias added to the first."""
    total = partials[0] if bias is None else partials[0] + channels(bias, operation, partials[0].ndim)
    for partial in partials[1:]:
        total = total + partial
    return total
