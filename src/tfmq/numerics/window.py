"""How an operation reads its input: the window that lies over it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Window:
    """How an operation reads an input `[B, C, *sizes]`: as an ordinary convolution reads it once `laid_out`
    has padded it.

    Attributes, with one entry for each spatial axis, of which a linear layer has none:
        size: size of the window.
        stride: places from one window to the next.
        dilation: places from one tap of the window to the next.
        border: zeros in front of the input and behind it; less than none cuts values off.
        spacing: places from one value of the input to the next, with zeros between them.
        mirrored: whether the window's taps come in the reverse order of the weight's.
    """

    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    border: tuple[tuple[int, int], ...] = ()
    spacing: tuple[int, ...] = ()
    mirrored: bool = False

    @property
    def reads_zeros(self) -> bool:
        """Whether a window may hold zeros that are none of the input's."""
        return self.spaced or any(max(pair) > 0 for pair in self.border)

    @property
    def spaced(self) -> bool:
        """Whether zeros lie between the values of the input."""
        return prod(self.spacing) > 1

    @property
    def pointwise(self) -> bool:
        """Whether each place of the output reads the same place of the input and no other."""
        return (
            prod(self.size) == 1
            and prod(self.stride) == 1
            and not self.spaced
            and not any(map(any, self.border))
        )

    def extent(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return what `laid_out` makes of the `sizes` of an input."""
        axes = zip(sizes, self.spacing, self.border, strict=True)
        return tuple((size - 1) * step + 1 + before + after for size, step, (before, after) in axes)

    def laid_out(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """Return `x` with `fill` where the window reads zeros."""
        x = self._spread(x, fill) if self.spaced else x
        return (
            F.pad(x, [edge for pair in reversed(self.border) for edge in pair], value=fill)
            if any(map(any, self.border))
            else x
        )

    def _spread(self, x: Tensor, fill: float) -> Tensor:
        sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], self.spacing, strict=True)]
        last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        wide = torch.empty(*x.shape[:2], *sizes, dtype=x.dtype, device=x.device, memory_format=layout).fill_(
            fill
        )
        apart: tuple[Any, ...] = (..., *(slice(None, None, step) for step in self.spacing))
        wide[apart] = x
        return wide

    def slid(self, weight: Tensor) -> Tensor:
        """Return a weight `[C_out, C_in / groups, *size]` with its taps in the order in which the window has
        them.
        """
        return weight.flip(list(range(2, weight.ndim))) if self.mirrored else weight

    def tap(self, number: Tensor, axis: int) -> Tensor:
        """Return where along an axis of the window the taps with these numbers in the weight lie."""
        return (self.size[axis] - 1 - number if self.mirrored else number) * self.dilation[axis]

    def places(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return how many places an output has along each axis for an input that is laid out and has
        `sizes`.
        """
        axes = zip(sizes, self.size, self.stride, self.dilation, strict=True)
        return tuple((size - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, step in axes)
