"""Rotation of groups of an input's channels by a regular Hadamard matrix.

`x W^T = (x H) (W H)^T` for the orthonormal, symmetric `H`, which spreads an outlier over its group: where one
channel alone is large, each output gets an equal share of it. The matrix of 4 is `J / 2 - P`, with `J` of
ones and `P` reversing the order, and larger ones are Kronecker powers of it. All rows have the same sum, so
that a mean that all channels share is not gathered in one of them (ConvRot, arXiv 2512.03673).
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
import torch.nn.functional as F
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


def _regular(size: int) -> Tensor:
    """Return the matrix of `size`, whose values are sums of powers of two: exact in every dtype."""
    smallest = torch.full((ORDER, ORDER), 0.5, device="cpu") - torch.eye(ORDER, device="cpu").flip(0)
    found = torch.ones(1, 1, device="cpu")
    while len(found) < size:
        found = torch.kron(found, smallest)
    return found


# Products with larger matrices are put together from these. They are made here, since a graph keeps what is
# made while it is captured.
MATRICES = {size: _regular(size) for size in (4, 16, 64, 256)}
LARGEST = max(MATRICES)


@cache
def _moved(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return MATRICES[size].to(device, dtype)


def _matrix(size: int, like: Tensor) -> Tensor:
    matrix = MATRICES[size]
    if matrix.dtype == like.dtype and matrix.device == like.device:
        return matrix
    return matrix.to(like) if torch.compiler.is_compiling() else _moved(size, like.device, like.dtype)


def rotate(x: Tensor, size: int) -> Tensor:
    """Return `x` `[..., C]` with every group of `size` channels rotated; the same once more undoes it.

    As a product with the matrix, which is faster on a CPU than sums and differences along axes of four
    (docs/log.md). The matrix is a weight to torch, not an activation: `ProductMode` takes what `@` multiplies
    for a product of attention.
    """
    if size in MATRICES:
        return F.linear(x.unflatten(-1, (-1, size)), _matrix(size, x)).flatten(-2)
    # The matrix is the Kronecker product of that of the outer places and that of the inner ones.
    parts = rotate(x.unflatten(-1, (-1, size // LARGEST, LARGEST)), LARGEST)
    return rotate(parts.mT, size // LARGEST).mT.flatten(-3)
