"""Which operation a module computes, by its type."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from tfmq.numerics.operations import Convolution, Linear, Operation, TransposedConvolution

OPERATIONS: dict[type[nn.Module], Callable[[nn.Module], Operation | None]] = {}


def register_operation(
    *kinds: type[nn.Module],
) -> Callable[[Callable[..., Operation | None]], Callable[..., Operation | None]]:
    """Return a decorator that registers what builds the operation of modules of these types.

    Raises:
        ValueError: a type has one already.
    """

    def fill(build: Callable[..., Operation | None]) -> Callable[..., Operation | None]:
        for kind in kinds:
            if kind in OPERATIONS:
                raise ValueError(f"an operation for {kind.__name__} is registered already")
            OPERATIONS[kind] = build
        return build

    return fill


@register_operation(nn.Linear)
def _linear(_: nn.Linear) -> Operation:
    return Linear()


@register_operation(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(module: nn.Conv2d) -> Operation | None:
    if module.padding_mode != "zeros":
        return None
    return Convolution(module.stride, module.padding, module.dilation, module.groups)


@register_operation(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(module: nn.ConvTranspose2d) -> Operation | None:
    assert not isinstance(module.padding, str)
    return TransposedConvolution(
        module.stride, module.padding, module.output_padding, module.dilation, module.groups
    )


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks up rows of its weight and does nothing else."""
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
    )


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight `[C_out, C_in, ...]` of a weighted layer, stock or quantized, whatever layout a stock
    one keeps it in.

    Raises:
        TypeError: the module has none.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor")
    operation = operation_of(module)
    return weight if operation is None else operation.rows(weight)


def operand(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the input of a weighted layer's call, which a model may pass by position or by name."""
    given: Tensor = (*args, *kwargs.values())[0]
    return given


def operation_of(module: nn.Module) -> Operation | None:
    """Return the operation of a stock weighted layer or a subclass with its `forward`; None for anything that
    cannot be quantized.
    """
    for kind in type(module).__mro__:
        if kind in OPERATIONS:
            return OPERATIONS[kind](module) if type(module).forward is kind.forward else None
    return None
