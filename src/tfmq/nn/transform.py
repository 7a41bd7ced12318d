"""What is done to the input of a layer before it is quantized, and the opposite that is done to its weight: a
factor for each channel, then a rotation of groups of channels.
"""

from torch import Tensor

from tfmq.kernels.kernel import channels
from tfmq.numerics.equivalence import by_row
from tfmq.numerics.operations import Operation
from tfmq.numerics.rotation import rotate


def transformed(x: Tensor, factor: Tensor | None, rotated: int, operation: Operation) -> Tensor:
    """Return an input multiplied by the `factor` `[C_in]`, with groups of `rotated` channels rotated."""
    if factor is not None:
        x = x * channels(factor, operation, x.ndim).to(x.dtype)
    return rotate(x, rotated) if rotated else x


def opposed(rows: Tensor, factor: Tensor | None, rotated: int, groups: int) -> Tensor:
    """Return the rows of a weight for transformed inputs."""
    if factor is not None:
        rows = rows / by_row(factor, rows, groups).to(rows.dtype)
    return rotate(rows, rotated) if rotated else rows


def restored(rows: Tensor, factor: Tensor | None, rotated: int, groups: int) -> Tensor:
    """Undo `opposed`."""
    rows = rotate(rows, rotated) if rotated else rows
    return rows if factor is None else rows * by_row(factor, rows, groups)
