"""What a weighted layer computes, as a value apart from its weights."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Linear:
    """`x @ weight.T + bias`; channels are the last axis of `x`."""

    channel_axis: int = -1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)


@dataclass(frozen=True)
class Convolution:
    """A zero-padded convolution over 1 to 3 spatial axes; channels are axis 1 of `x`."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    channel_axis: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        function = (F.conv1d, F.conv2d, F.conv3d)[weight.ndim - 3]
        return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


Operation = Linear | Convolution
