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
from torch import Tensor, nn
from torch.nn.utils import skip_init

from tfmq.numerics.window import Window


class Operation(ABC):
    """A product of an input with a weight, plus a bias.

    Attributes:
        kind: its name in words.
        described: its name in a manifest; None where the shape of the weight says it.
        channel_axis: axis of the channels, in inputs and outputs.
        by_token: whether it multiplies each token by itself, so that a token may have a grid of its own.
        groups: number of groups of channels; the outputs of a group read the inputs of that group alone.
    """

    kind: ClassVar[str]
    described: ClassVar[str | None] = None
    channel_axis: ClassVar[int]
    by_token: ClassVar[bool] = False
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

    @abstractmethod
    def work(self, weight: Sequence[int], input: Sequence[int]) -> int:
        """Return the multiplications of a call by the shapes of weight and input: every weight at every place
        of the output, or of the input that is spread out.
        """

    @abstractmethod
    def module(self, weight: Sequence[int], **options: Any) -> nn.Module:
        """Return the stock module for rows of the shape `weight`, with values of whatever is in memory.

        `options` are bias, device and dtype, as the module takes them.
        """


@dataclass(frozen=True)
class Linear(Operation):
    """`x @ weight.T + bias`; channels are the last axis of `x`."""

    kind: ClassVar[str] = "linear"
    channel_axis: ClassVar[int] = -1
    by_token: ClassVar[bool] = True
    groups: ClassVar[int] = 1  # type: ignore[misc]

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias`."""
        return F.linear(x, weight, bias)

    def window(self, kernel: Sequence[int]) -> Window:
        """Return the window of a layer without places."""
        return Window()

    def places(self, output: Tensor) -> int:
        """Return the number of tokens of a sample."""
        return prod(output.shape[1:-1])

    def outputs_at(self, output: Tensor, places: Tensor) -> Tensor:
        """Return the tokens `places` of every sample, `[N * R, C]`."""
        return output.reshape(len(output), -1, output.shape[-1])[:, places].flatten(0, 1)

    def inputs_at(self, x: Tensor, kernel: Sequence[int], places: Tensor) -> Tensor:
        """Return the tokens `places` that the layer reads, as those of one group."""
        return self.outputs_at(x, places)[None]

    def work(self, weight: Sequence[int], input: Sequence[int]) -> int:
        """Return the multiplications of all tokens."""
        return prod(weight) * prod(input[:-1])

    def module(self, weight: Sequence[int], **options: Any) -> nn.Module:
        """Return a linear layer."""
        return skip_init(nn.Linear, weight[1], weight[0], **options)


class Sliding(Operation):
    """A window that slides over one to three spatial axes; channels are axis 1 of `x`.

    Attributes:
        stock: classes of the stock modules, over one, two and three axes. They take the fields of the
            operation by name.
    """

    channel_axis: ClassVar[int] = 1
    stock: ClassVar[tuple[type[nn.Module], ...]]

    def places(self, output: Tensor) -> int:
        """Return the number of pixels of a sample."""
        return prod(output.shape[2:])

    def outputs_at(self, output: Tensor, places: Tensor) -> Tensor:
        """Return the channels at the pixels `places` of every sample, `[N * R, C]`."""
        return output.flatten(2).mT[:, places].flatten(0, 1)

    def inputs_at(self, x: Tensor, kernel: Sequence[int], places: Tensor) -> Tensor:
        """Return what the windows at `places` of the output hold, for each group."""
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
        """Return an image with its channels last in memory."""
        return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x

    def work(self, weight: Sequence[int], input: Sequence[int]) -> int:
        """Return the multiplications of all places."""
        sizes, window = input[2:], self.window(weight[2:])
        return prod(weight) * input[0] * prod(sizes if window.spaced else window.places(sizes))

    def module(self, weight: Sequence[int], **options: Any) -> nn.Module:
        """Return the stock module over as many axes as the kernel has, with the fields of the operation."""
        kind, channels = self.stock[len(weight) - 3], weight[1] * self.groups
        return skip_init(kind, channels, weight[0], weight[2:], **vars(self), **options)


@dataclass(frozen=True)
class Convolution(Sliding):
    """A zero-padded convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    kind: ClassVar[str] = "convolution"
    stock: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of `x` over one to three spatial axes."""
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def window(self, kernel: Sequence[int]) -> Window:
        """Return the window that moves by the stride over the padded input."""
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
    stock: ClassVar[tuple[type[nn.Module], ...]] = (
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )
    described: ClassVar[str | None] = "transposed_convolution"

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the transposed convolution of `x` over one to three spatial axes."""
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
        return function(
            x, weight, bias, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )

    def rows(self, weight: Tensor) -> Tensor:
        """Return a weight with input and output channels exchanged within each group."""
        return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1)

    def stored(self, weight: Tensor) -> Tensor:
        """Exchange input and output channels of rows back."""
        # The same exchange of axes leads back.
        return self.rows(weight).contiguous()

    @property
    def stored_axis(self) -> int | None:
        """Return axis 1, or None where groups share it."""
        return 1 if self.groups == 1 else None

    def window(self, kernel: Sequence[int]) -> Window:
        """Return the mirrored window that moves place by place over the input with zeros in between."""
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
