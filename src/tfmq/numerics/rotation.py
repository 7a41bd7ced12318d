"""Rotation of groups of an input's channels by a regular Hadamard matrix.

`x W^T = (x H) (W H)^T` for the orthonormal, symmetric `H`, which spreads an outlier over its group: where one
channel alone is large, each output gets an equal share of it. The matrix of 4 is `J / 2 - P`, with `J` of
ones and `P` reversing the order, and larger ones are Kronecker powers of it. All rows have the same sum, so
that a mean that all channels share is not gathered in one of them (ConvRot, arXiv 2512.03673).
"""

from collections.abc import Sequence
from math import gcd

from torch import Tensor

# The order of the smallest regular Hadamard matrix; those of other groups are powers of it.
ORDER = 4


def is_group(size: int) -> bool:
    """Whether there is a regular Hadamard matrix of a group of `size` channels: a power of four.

    >>> [size for size in range(300) if is_group(size)]
    [4, 16, 64, 256]
    """
    return size > 1 and size.bit_count() == 1 and size.bit_length() % 2 == 1


def largest_group(widths: Sequence[int], most: int) -> int:
    """Return the size of the largest groups, of at most `most` channels, that segments of these widths divide
    into; 0 where there are none.

    >>> largest_group([1280], 256), largest_group([320, 640], 256), largest_group([6], 256)
    (256, 64, 0)
    """
    whole, size, found = gcd(*widths), ORDER, 0
    while size <= most and whole % size == 0:
        size, found = size * ORDER, size
    return found


def rotate(x: Tensor, size: int) -> Tensor:
    """Return `x` `[..., C]` with every group of `size` channels rotated; the same once more undoes it.

    The transform is a fast one: along each of `log4 size` axes of four a sum and a difference.
    """
    axes = (size.bit_length() - 1) // 2
    grouped = x.unflatten(-1, (-1, *[ORDER] * axes))
    for axis in range(1, axes + 1):
        grouped = grouped.sum(dim=-axis, keepdim=True) / 2 - grouped.flip(-axis)
    return grouped.flatten(-axes - 1)
