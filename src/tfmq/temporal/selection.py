"""Disturbance-aware selection: table or block for each temporal feature, whichever disturbs it less (Temporal
Feature Matters, section 4).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["key", "feature", "step", "global"]
# For each scope the axes of the [features, steps] error table that one choice averages over.
_AVERAGED: dict[str, tuple[int, ...]] = {"key": (), "feature": (1,), "step": (0,), "global": (0, 1)}


def select_tables(
    block_error: Mapping[str, Tensor], table_error: Mapping[str, Tensor], *, scope: Scope = "key"
) -> dict[str, Tensor]:
    """Return for each feature a bool `[S]`: True where its table has at most the block's squared relative
    error; ties go to the table.

    Args:
        block_error: relative error `[S]` of each feature through the quantized temporal block.
        table_error: the same through the quantized table.
        scope: a choice for each (feature, step), feature, step, or one for all; errors are averaged over what
            a choice covers.
    """
    names = list(block_error)
    if not names:
        return {}
    block = torch.stack([block_error[name] for name in names]).square()
    table = torch.stack([table_error[name] for name in names]).square()
    axes = _AVERAGED[scope]
    if axes:
        shape = block.shape
        block, table = (errors.mean(dim=axes, keepdim=True).expand(shape) for errors in (block, table))
    chosen = table <= block
    return {name: chosen[i].clone() for i, name in enumerate(names)}
