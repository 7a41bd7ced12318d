"""Pack small unsigned integers into bytes: the one layout on disk, whatever kernel reads it later.

Element `k` of a row occupies bits `k * bits` to `(k + 1) * bits - 1` of that row, bit `i` of a row being bit
`i % 8` (least significant first) of byte `i // 8`. Rows start on a byte; unused bits of a row's last byte are
zero. At 4 bits: element `2k` in the low nibble, `2k + 1` in the high one.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["pack_unsigned", "packed_shape", "unpack_unsigned"]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def packed_shape(shape: Sequence[int], *, bits: int) -> tuple[int, int]:
    """Return the shape `(rows, ceil(n * bits / 8))` of the packed form of a tensor of `shape` `(rows, ...)`
    with `n` elements a row.

    >>> packed_shape((8, 3, 3), bits=4)
    (8, 5)

    Raises:
        ValueError: `bits` is not in 1..8, `shape` has no axis or a negative length.
    """
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}; packing takes 1 to 8")
    if not shape or min(shape) < 0:
        raise ValueError(
            f"shape is {tuple(shape)}; packing takes one or more axes of "
            "length 0 or more, the first being the rows"
        )
    return shape[0], -(-math.prod(shape[1:]) * bits // 8)


def pack_unsigned(values: Tensor, *, bits: int) -> Tensor:
    """Pack integers of `[0, 2**bits - 1]`, shape `(rows, ...)`, into uint8 of shape
    `packed_shape(values.shape, bits=bits)` on the same device.

    >>> pack_unsigned(torch.tensor([[1, 2, 3]]), bits=4)
    tensor([[33,  3]], dtype=torch.uint8)

    Raises:
        TypeError: `values` is not an integer tensor.
        ValueError: a value is out of range, `bits` is not in 1..8, or `values` has no axis.
    """
    rows, row_bytes = packed_shape(values.shape, bits=bits)
    _check_values(values, bits=bits)
    elements, word_bytes, word = _group(bits)
    count = math.prod(values.shape[1:])
    groups = -(-count // elements)
    flat = functional.pad(values.to(torch.uint8).reshape(rows, count), (0, groups * elements - count)).view(
        rows, groups, elements
    )
    words = flat[..., 0].to(word)
    for index in range(1, elements):
        words = words | (flat[..., index].to(word) << (index * bits))
    return (
        _split(words, parts=word_bytes, width=8)
        .reshape(rows, groups * word_bytes)[:, :row_bytes]
        .contiguous()
    )


def unpack_unsigned(packed: Tensor, *, bits: int, shape: Sequence[int]) -> Tensor:
    """Invert `pack_unsigned`: uint8 of shape `packed_shape(shape, bits=bits)` to uint8 of `shape`, on the
    same device.

    >>> unpack_unsigned(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, shape=(1, 3))
    tensor([[1, 2, 3]], dtype=torch.uint8)

    Raises:
        TypeError: `packed` is not uint8.
        ValueError: `packed` has another shape than `shape` at `bits` packs to, or these are refused by
            `packed_shape`.
    """
    rows, row_bytes = expected = packed_shape(shape, bits=bits)
    if packed.dtype != torch.uint8:
        raise TypeError(f"packed is {packed.dtype}; packed values are torch.uint8")
    if tuple(packed.shape) != expected:
        raise ValueError(
            f"packed has shape {tuple(packed.shape)}; {tuple(shape)} at {bits} bits packs to {expected}"
        )
    elements, word_bytes, word = _group(bits)
    groups = -(-row_bytes // word_bytes)
    flat = functional.pad(packed, (0, groups * word_bytes - row_bytes)).view(rows, groups, word_bytes)
    words = flat[..., 0].to(word)
    for index in range(1, word_bytes):
        words = words | (flat[..., index].to(word) << (8 * index))
    values = _split(words, parts=elements, width=bits).reshape(rows, groups * elements)
    return values[:, : math.prod(shape[1:])].reshape(tuple(shape))


def _group(bits: int) -> tuple[int, int, torch.dtype]:
    """Return the smallest run of elements that fills whole bytes: its elements, its bytes, and the dtype to
    assemble it in.
    """
    common = math.gcd(bits, 8)
    # A run of several bytes has at most 7, so it never reaches the sign bit of int64.
    return 8 // common, bits // common, torch.uint8 if bits == common else torch.int64


def _split(words: Tensor, *, parts: int, width: int) -> Tensor:
    """Cut each word into `parts` fields of `width` bits, lowest first: `(rows, groups)` to uint8 `(rows,
    groups, parts)`.
    """
    fields = torch.empty(*words.shape, parts, dtype=torch.uint8, device=words.device)
    for index in range(parts):
        fields[..., index] = (words >> (index * width)) & (2**width - 1)
    return fields


def _check_values(values: Tensor, *, bits: int) -> None:
    if values.dtype not in _INTEGERS:
        raise TypeError(f"values are {values.dtype}; packing takes one of {', '.join(map(str, _INTEGERS))}")
    if values.is_meta or values.numel() == 0:
        return
    lowest, highest = (int(bound) for bound in torch.aminmax(values))
    if lowest < 0 or highest >= 2**bits:
        raise ValueError(f"values span {lowest} to {highest}; {bits} bits hold 0 to {2**bits - 1}")
