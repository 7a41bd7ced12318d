"""What is done to the input of a layer before it is quantized, and the opposite that is done to its weight: a
factor for each channel, then a rotation of groups of channels or another order of them.
"""

from dataclasses import dataclass

from torch import Tensor

from tfmq.kernels.kernel import channels
from tfmq.numerics.equivalence import by_row
from tfmq.numerics.operations import Operation
from tfmq.numerics.rotation import rotate


@dataclass(frozen=True)
class Transform:
    """What becomes of a layer's input: its channels are multiplied by a `factor` `[C_in]`, or groups of
    `rotated` of them rotated, and then put in an `order` `[C_in]` in which `segments` of them have grids of
    their own; nothing where there is none of them.
    """

    factor: Tensor | None = None
    rotated: int = 0
    order: Tensor | None = None
    segments: tuple[int, ...] = ()


def transformed(
    x: Tensor, factor: Tensor | None, rotated: int, order: Tensor | None, operation: Operation
) -> Tensor:
    """Return an input multiplied by the `factor` `[C_in]`, with groups of `rotated` channels rotated, and its
    channels in the `order` `[C_in]`.
    """
    if factor is not None:
        x = x * channels(factor, operation, x.ndim).to(x.dtype)
    x = rotate(x, rotated) if rotated else x
    return x if order is None else x.index_select(operation.channel_axis, order)


def opposed(rows: Tensor, factor: Tensor | None, rotated: int, order: Tensor | None, groups: int) -> Tensor:
    """Return the rows of a weight for transformed inputs."""
    if factor is not None:
        rows = rows / by_row(factor, rows, groups).to(rows.dtype)
    rows = rotate(rows, rotated) if rotated else rows
    return rows if order is None else rows.index_select(1, order)


def restored(rows: Tensor, factor: Tensor | None, rotated: int, order: Tensor | None, groups: int) -> Tensor:
    """Undo `opposed`."""
    rows = rows if order is None else rows.index_select(1, order.argsort())
    rows = rotate(rows, rotated) if rotated else rows
    return rows if factor is None else rows * by_row(factor, rows, groups)
