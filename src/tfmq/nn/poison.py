"""NaN in, NaN out: what integers cannot hold is carried around them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map


def _floats(tree: Any) -> Iterator[Tensor]:
    return (
        leaf
        for leaf in tree_flatten(tree)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
    )


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

    def spoil(leaf: Any) -> Any:
        if not (isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim):
            return leaf
        rows = torch.zeros(len(leaf), dtype=torch.bool, device=leaf.device)
        for part in broken:
            apart = part.ndim and not len(leaf) % len(part)
            own = part.reshape(len(part), -1).any(dim=1) if apart else part.any()[None]
            rows |= own.repeat_interleave(len(leaf) // len(own)).to(leaf.device)
        return leaf.masked_fill(rows.reshape(-1, *[1] * (leaf.ndim - 1)), torch.nan)

    return tree_map(spoil, output)
