"""Attention in integers on the CPU: both products u8 x s8, a block of scores at a time, so that no whole map
is ever in memory.

The codes of keys and values are moved by 128 to fit into s8, with `k' = k - 128` and `v' = v - 128`. Of the
scores

    s_q s_k scale (sum q k' - z_q sum k' + (128 - z_k) sum (q - z_q))

the last term is the same for all keys of a query: softmax does not see it, and it is left out. In the output

    s_p s_v (sum p v' - z_p sum v' + (128 - z_v) sum (p - z_p))

the sum of a query's codes comes from a column of ones behind the values. Integer sums are exact in int32.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tfmq.kernels.kernel import Rows
from tfmq.kernels.onednn import MIDDLE, multipliable, quantize_u8
from tfmq.numerics.attention import Attention, probabilities

# Number of scores in a block of queries. They should stay in the processor's caches until they have become
# codes of probabilities.
BLOCK = 2**19
# Smallest number of scores in a map. Below it batched products in floating point are faster, since each head
# takes two calls here.
SMALLEST = 2**14


class OperandGrid(NamedTuple):
    """The input grid of one sample."""

    scale: float
    zero_point: int
    levels: int

    def codes(self, x: Tensor) -> Tensor:
        """Return the codes of `x`, uint8."""
        return quantize_u8(x.contiguous(), *self)

    def signed(self, x: Tensor) -> Tensor:
        """Return `codes - 128`, int8."""
        return self.codes(x).view(torch.int8) ^ -MIDDLE


class Grids(NamedTuple):
    """The grids of one sample's operands."""

    query: OperandGrid
    key: OperandGrid
    probabilities: OperandGrid
    value: OperandGrid


def integer_attention(call: Attention, rows: Sequence[Rows]) -> Tensor | None:
    """Return the attention of `call` with query, key, probabilities and value on the grids `rows`, in the
    dtype of the query.

    None where that is no gain, where codes have more than eight bits or sums could leave int32.
    """
    keys, width = call.key.shape[-2:]
    if call.query.shape[-2] * keys < SMALLEST or not multipliable(max(keys, width), *rows):
        return None
    heads = torch.broadcast_shapes(*(x.shape[:-2] for x in (call.query, call.key, call.value)))
    query, key, value = (
        x.float().expand(*heads, *x.shape[-2:]).reshape(-1, *x.shape[-2:])
        for x in (call.query, call.key, call.value)
    )
    out = query.new_empty(len(query), query.shape[-2], value.shape[-1])
    masks = None if call.mask is None else _Masks.of(call.mask, heads)
    grids = list(_grids(rows))
    of_sample = len(query) // len(grids)
    for number, grid in enumerate(grids):
        part = slice(number * of_sample, (number + 1) * of_sample)
        _attend(
            query[part],
            key[part],
            value[part],
            None if masks is None else masks.of_heads(part),
            call.scale,
            grid,
            out[part],
        )
    return out.reshape(*heads, *out.shape[-2:]).to(call.query.dtype)


def _grids(rows: Sequence[Rows]) -> Iterator[Grids]:
    """Yield the grids of each sample, or once those of all."""
    samples = max(len(grid.scale) for grid in rows)
    columns = [
        [
            OperandGrid(scale, zero_point, grid.levels)
            for scale, zero_point in zip(
                grid.scale[:, 0].tolist(), grid.zero_point[:, 0].tolist(), strict=True
            )
        ]
        for grid in rows
    ]
    yield from map(Grids, *(column * samples if len(column) == 1 else column for column in columns))


@dataclass(frozen=True)
class _Masks:
    """Masks `[M, L or 1, S or 1]`, and which of them each head `[N]` has: a mask that heads share is not
    repeated.
    """

    masks: Tensor
    index: Tensor

    @classmethod
    def of(cls, mask: Tensor, heads: torch.Size) -> "_Masks":
        """Take a mask of attention apart into the masks that differ and what each of the `heads` has."""
        own = mask.shape[:-2]
        index = torch.arange(math.prod(own)).reshape(own).expand(heads).reshape(-1)
        # A mask may be one row of keys: give it two axes.
        return cls(mask.reshape(-1, *mask.shape[-2:] if mask.ndim > 1 else (1, mask.shape[-1])), index)

    def of_heads(self, part: slice) -> "_Masks":
        """Return the masks of some of the heads."""
        return _Masks(self.masks, self.index[part])

    def block(self, heads: slice, queries: slice) -> Tensor:
        """Return the masks of some heads and queries, `[heads, queries or 1, S or 1]`."""
        masks = self.masks if self.masks.shape[1] == 1 else self.masks[:, queries]
        return masks[self.index[heads]]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, masks: _Masks | None, scale: float, grids: Grids, out: Tensor
) -> None:
    """Write the attention of heads on one grid, `[N, L, D]`, `[N, S, D]` and `[N, S, E]`, to `out` `[N, L,
    E]`.
    """
    (heads, queries, _), keys = query.shape, key.shape[1]
    left, right = grids.query.codes(query), grids.key.signed(key)
    values = grids.value.signed(value)
    values = torch.cat([values, values.new_ones(heads, keys, 1)], dim=-1)
    factor = grids.query.scale * grids.key.scale * scale
    shift = right.sum(dim=-1, dtype=torch.int32).float().mul_(-grids.query.zero_point * factor).unsqueeze(1)
    right = right.transpose(1, 2)
    group, step = max(1, min(heads, BLOCK // (queries * keys))), max(1, min(queries, BLOCK // keys))
    # One buffer for all blocks: the system would have to map fresh memory for each.
    integers, real, seen = (
        torch.empty(group, step, keys, dtype=dtype) for dtype in (torch.int32, torch.float32, torch.float32)
    )
    sums = torch.empty(heads, queries, values.shape[-1], dtype=torch.int32)
    for first in range(0, heads, group):
        some = slice(first, min(first + group, heads))
        for start in range(0, queries, step):
            block = slice(start, min(start + step, queries))
            size = slice(some.stop - first), slice(block.stop - start)
            scores = real[size].copy_(_multiplied(left[some, block], right[some], integers[size]))
            torch.add(shift[some], scores, alpha=factor, out=scores)
            mask = None if masks is None else masks.block(some, block)
            _multiplied(
                grids.probabilities.codes(probabilities(scores, mask, out=seen[size])),
                values[some],
                sums[some, block],
            )
    total = sums.float()
    if grids.probabilities.zero_point:
        total -= grids.probabilities.zero_point * values.sum(dim=1, keepdim=True, dtype=torch.int32)
    torch.add(total[..., :-1], total[..., -1:], alpha=MIDDLE - grids.value.zero_point, out=out)
    out.mul_(grids.probabilities.scale * grids.value.scale)


def _multiplied(codes: Tensor, values: Tensor, out: Tensor) -> Tensor:
    """Return `codes @ values`, u8 `[N, M, K]` and s8 `[N, K, E]`, in `out` int32."""
    for number in range(len(codes)):
        torch._int_mm(codes[number], values[number], out=out[number])
    return out
