"""What a weighted layer computes, as a value apart from its weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


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
_OPERATIONS: dict[type[nn.Module], Callable[[nn.Module], Operation | None]] = {}


def _operation(*kinds: type[nn.Module]) -> Callable[[Callable[..., Operation | None]], Callable[..., Operation | None]]:
    def fill(build: Callable[..., Operation | None]) -> Callable[..., Operation | None]:
        for kind in kinds:
            if kind in _OPERATIONS:
                raise ValueError(f"an operation for {kind.__name__} is registered already")
            _OPERATIONS[kind] = build
        return build

    return fill


@_operation(nn.Linear)
def _linear(_: nn.Linear) -> Operation:
    return Linear()


@_operation(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d) -> Operation | None:
    if module.padding_mode != "zeros":
        return None
    return Convolution(module.stride, module.padding, module.dilation, module.groups)


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight `[C_out, C_in, ...]` of a weighted layer, stock or quantized.

    Raises:
        TypeError: the module has none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    return weight


def operation_of(module: nn.Module) -> Operation | None:
    """Return the operation of a stock weighted layer or a subclass with its `forward`; None for anything that cannot be quantized."""
    for kind in type(module).__mro__:
        if kind in _OPERATIONS:
            return _OPERATIONS[kind](module) if type(module).forward is kind.forward else None
    return None
