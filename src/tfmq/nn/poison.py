"""NaN in, NaN out: what integers cannot hold is carried around them."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq.numerics.trees import map_tensors, tensors_in


def _floats(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tensors_in(tree) if leaf.is_floating_point() and leaf.numel())


def poisoned(output: Any, arguments: Any) -> Any:
    """Return the output of a denoiser with NaN for each sample that has a NaN among the inputs `arguments`,
    as full precision gives.

    No integer stands for NaN, and what a quantizer makes of one differs between libraries. Within the model
    none arises in float32: integer layers put out what their grids bound, and infinities are the ends of a
    grid. A tensor without a row for each sample concerns all of them.
    """
    floats = list(_floats(arguments))
    # A sum is NaN where a term is: one pass a tensor, at every call. Infinities of both signs end here too,
    # and are looked at closely.
    if not floats or not math.isnan(float(sum(leaf.detach().sum() for leaf in floats))):
        return output
    broken = [leaf.isnan() for leaf in floats]
    if not bool(torch.stack([part.any() for part in broken]).any()):
        return output

    def spoil(leaf: Tensor) -> Tensor:
        if not (leaf.is_floating_point() and leaf.ndim):
            return leaf
        rows = _rows(broken, len(leaf)).to(leaf.device)
        return leaf.masked_fill(rows.reshape(-1, *[1] * (leaf.ndim - 1)), torch.nan)

    return map_tensors(spoil, output)


def _rows(broken: Sequence[Tensor], count: int) -> Tensor:
    """Return which of `count` rows have a NaN among the elements that `broken` marks."""
    rows = torch.zeros(count, dtype=torch.bool, device=broken[0].device)
    for part in broken:
        apart = part.ndim and not count % len(part)
        own = part.reshape(len(part), -1).any(dim=1) if apart else part.any()[None]
        rows |= own.repeat_interleave(count // len(own)).to(rows.device)
    return rows
