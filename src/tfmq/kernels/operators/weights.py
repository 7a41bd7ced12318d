"""Integer weights as they lie in device memory: signed bytes, or two four-bit codes in a byte.

The layout is derived at load from the one on disk. A weight `[N, taps, C]` of codes below 16 is halved
segment by segment: of a segment of `w` channels, byte `j` of `h = ceil(w / 2)` holds the code of channel `j`
in its low and of channel `h + j` in its high bits. So a tile of bytes is two tiles of codes that meet two
contiguous tiles of the input: nothing has to be interleaved in registers, whatever the tile.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq.kernels.operators.grids import widths


def half_packed(codes: Tensor, segments: Sequence[int]) -> Tensor:
    """Return codes `[N, ..., C]` below 16 as bytes `[N, ..., sum of ceil(w / 2)]`, uint8; an odd segment ends
    in a code of zero.
    """
    parts = []
    for part in codes.to(torch.uint8).split(widths(segments, codes.shape[-1]), dim=-1):
        half = (part.shape[-1] + 1) // 2
        high = torch.nn.functional.pad(part[..., half:], (0, 2 * half - part.shape[-1]))
        parts.append(part[..., :half] | (high << 4))
    return torch.cat(parts, dim=-1).contiguous()


def half_unpacked(packed: Tensor, segments: Sequence[int], channels: int) -> Tensor:
    """Invert `half_packed`: uint8 codes `[N, ..., channels]`."""
    sizes = widths(segments, channels)
    parts = packed.split([(width + 1) // 2 for width in sizes], dim=-1)
    return torch.cat(
        [
            torch.cat([part & 15, part >> 4], dim=-1)[..., :width]
            for part, width in zip(parts, sizes, strict=True)
        ],
        dim=-1,
    )


def integers_of(weight: Tensor, zero_point: Tensor | None, segments: Sequence[int], channels: int) -> Tensor:
    """Return the integers `v` `[N, ..., C]` of a weight in device memory: int8 ones as they are, codes less
    their zero-point `[N, G]`.
    """
    if zero_point is None:
        return weight.to(torch.int16)
    codes = half_unpacked(weight, segments, channels).to(torch.int16)
    sizes = widths(segments, channels)
    wide = torch.cat([zero_point[:, g : g + 1].expand(-1, width) for g, width in enumerate(sizes)], dim=1).to(
        torch.int16
    )
    return codes - wide.reshape(len(codes), *[1] * (codes.ndim - 2), channels)
