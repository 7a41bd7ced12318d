"""Segments: parts of a channel axis that have a scale of their own each, as the tuple of their widths. `()`
stands for one scale for the whole axis.

They are the sources of a concatenation (Q-Diffusion, Li et al., 2023), or groups of inputs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def scales(segments: Sequence[int]) -> int:
    """Return the number of scales."""
    return max(1, len(segments))


def split(x: Tensor, segments: Sequence[int], *, axis: int) -> tuple[Tensor, ...]:
    """Return the parts of `x` along `axis`."""
    return x.split(tuple(segments), dim=axis) if segments else (x,)


def spread(values: Tensor, segments: Sequence[int], *, axis: int) -> Tensor:
    """Return one value for each channel, of one for each segment along `axis`; the one value of the whole
    axis stays one, and broadcasts.
    """
    if not segments:
        return values
    widths = torch.tensor(segments, device=values.device)
    # The size is said, since fake tensors cannot add the widths up.
    return values.repeat_interleave(widths, dim=axis, output_size=sum(segments))


def numbers(segments: Sequence[int], channels: int, positions: int) -> Tensor:
    """Return the segment of each column of a flattened weight `[R, channels, positions]`, `[channels *
    positions]`.
    """
    found = torch.arange(scales(segments)).repeat_interleave(torch.tensor(segments or (channels,)))
    return found.repeat_interleave(positions)
