"""What a weighted layer computes, as a value apart from its weights.

Weights are `[C_out, C_in / groups, *kernel]` here: a row for each output channel. A kernel `()` is that of a
linear layer. Modules keep some weights in another layout, of which `Operation.rows` and `Operation.stored`
are the two ways.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

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


class Operation(ABC):
    """A product of an input with a weight, plus a bias.

    Attributes:
        kind: its name in words.
        channel_axis: axis of the channels, in inputs and outputs.
        groups: number of groups of channels; the outputs of a group read the inputs of that group alone.
    """

    kind: ClassVar[str]
    channel_axis: ClassVar[int]
    groups: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output."""
        return self.multiply(x, self.stored(weight), bias)

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output by a weight in the layout of its module."""

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight in the layout of its module as rows, one for each output channel."""
        return weight

    def stored(self, weight: Tensor) -> Tensor:
        """Undo `rows`."""
        return weight

    @property
    def stored_axis(self) -> int | None:
        """The axis of the output channels in the layout of the module; None where no axis has them all."""
        return 0

    @abstractmethod
    def window(self, kernel: Sequence[int]) -> Window:
        """Return how a weight with this kernel reads its input."""

    @abstractmethod
    def places(self, output: Tensor) -> int:
        """Return the number of places of one sample of an output: pixels, or tokens."""

    @abstractmethod
    def outputs_at(self, output: Tensor, places: Tensor) -> Tensor:
        """Return an output's values at `places` `[P]` of each sample, `[N * P, C_out]`."""

    @abstractmethod
    def inputs_at(self, x: Tensor, kernel: Sequence[int], places: Tensor) -> Tensor:
        """Return what the outputs at `places` `[P]` of each sample read, `[groups, N * P, n]`, in the order
        of a flattened weight row.
        """

    def arranged(self, x: Tensor) -> Tensor:
        """Return an input or output in the memory format that integer libraries have for it."""
        return x


@dataclass(frozen=True)
class Linear(Operation):
    """`x @ weight.T + bias`; channels are the last axis of `x`."""

    kind: ClassVar[str] = "linear"
    channel_axis: ClassVar[int] = -1
    groups: ClassVar[int] = 1  # type: ignore[misc]

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    def window(self, kernel: Sequence[int]) -> Window:
        return Window()

    def places(self, output: Tensor) -> int:
        return prod(output.shape[1:-1])

    def outputs_at(self, output: Tensor, places: Tensor) -> Tensor:
        return output.reshape(len(output), -1, output.shape[-1])[:, places].flatten(0, 1)

    def inputs_at(self, x: Tensor, kernel: Sequence[int], places: Tensor) -> Tensor:
        return self.outputs_at(x, places)[None]


class Sliding(Operation):
    """A window that slides over one to three spatial axes; channels are axis 1 of `x`."""

    channel_axis: ClassVar[int] = 1

    def places(self, output: Tensor) -> int:
        return prod(output.shape[2:])

    def outputs_at(self, output: Tensor, places: Tensor) -> Tensor:
        return output.flatten(2).mT[:, places].flatten(0, 1)

    def inputs_at(self, x: Tensor, kernel: Sequence[int], places: Tensor) -> Tensor:
        window = self.window(kernel)
        padded = window.laid_out(x)
        size = padded.shape[2:]
        index = torch.zeros(len(places), 1, dtype=torch.int64)
        for axis, corner in enumerate(torch.unravel_index(places, window.places(size))):
            along = corner[:, None] * window.stride[axis] + window.tap(torch.arange(kernel[axis]), axis)
            index = (index[:, :, None] * size[axis] + along[:, None, :]).flatten(1)
        patches = padded.flatten(2)[:, :, index.to(x.device)]
        grouped = patches.unflatten(1, (self.groups, -1)).permute(1, 0, 3, 2, 4)
        return grouped.flatten(1, 2).flatten(2)

    def arranged(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


@dataclass(frozen=True)
class Convolution(Sliding):
    """A zero-padded convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    kind: ClassVar[str] = "convolution"

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def window(self, kernel: Sequence[int]) -> Window:
        once = (1,) * len(kernel)
        return Window(
            size=tuple(kernel),
            stride=self.stride,
            dilation=self.dilation,
            border=self._border(kernel),
            spacing=once,
        )

    def _border(self, kernel: Sequence[int]) -> tuple[tuple[int, int], ...]:
        spans = [step * (taps - 1) for taps, step in zip(kernel, self.dilation, strict=True)]
        if isinstance(self.padding, str):
            return tuple(
                (span // 2, span - span // 2) if self.padding == "same" else (0, 0) for span in spans
            )
        return tuple((amount, amount) for amount in self.padding)


@dataclass(frozen=True)
class TransposedConvolution(Sliding):
    """What a convolution does to gradients of its input: each value of `x` adds the weight, scaled by it, to
    a window of the output.

    The module keeps its weight as `[C_in, C_out / groups, *kernel]`.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    kind: ClassVar[str] = "transposed convolution"

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
        return function(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def rows(self, weight: Tensor) -> Tensor:
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def stored(self, weight: Tensor) -> Tensor:
        # The same exchange of axes leads back.
        return self.rows(weight).contiguous()

    @property
    def stored_axis(self) -> int | None:
        return 1 if self.groups == 1 else None

    def window(self, kernel: Sequence[int]) -> Window:
        spans = [step * (taps - 1) for taps, step in zip(kernel, self.dilation, strict=True)]
        sides = zip(spans, self.padding, self.output_padding, strict=True)
        border = tuple((span - cut, span - cut + more) for span, cut, more in sides)
        once = (1,) * len(kernel)
        return Window(
            size=tuple(kernel),
            stride=once,
            dilation=self.dilation,
            border=border,
            spacing=self.stride,
            mirrored=True,
        )
