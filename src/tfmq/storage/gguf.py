"""Files of GGUF, read: tensors of floating point, and linear layers whose blocks are exactly a grid of ours
(docs/gguf.md).
"""

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq.errors import LONGEST, cut, shown
from tfmq.numerics.blocks import BLOCK, Q4_0, Q4_1, Q8_0, UnheldError, from_blocks
from tfmq.numerics.packing import pack_unsigned

from .errors import ForeignFileError, TensorMismatchError
from .gguf_header import Entry, read_header

__all__ = ["BlockLayer", "read_gguf"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = {fmt.name: fmt for fmt in (Q8_0, Q4_0, Q4_1)}
WEIGHT = ".weight"


@dataclass(frozen=True)
class BlockLayer:
    """A linear layer with a scale for each 32 inputs of a row, that computes with its input as it comes.

    Attributes:
        bits: bits of a code.
        codes: uint8 `[C_out, C_in]`.
        scale: float32 `[C_out, C_in / 32]`, positive and finite.
        zero_point: uint8 of the same shape; None where all are the middle code.
    """

    bits: int
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def described(self) -> dict[str, Any]:
        """Return the entry of the layer in a structure (docs/format.md)."""
        count = self.scale.shape[1]
        segments = [BLOCK] * count if count > 1 else []
        return {
            "bits": self.bits,
            "symmetric": self.zero_point is None,
            "segments": segments,
            "input": None,
        }

    def stored(self) -> dict[str, Tensor]:
        """Return its tensors in that format, by name; each has a row for each of the weight's."""
        zero_point = {} if self.zero_point is None else {"zero_point": self.zero_point}
        return {"packed": pack_unsigned(self.codes, bits=self.bits), "scale": self.scale, **zero_point}


def read_gguf(path: Path) -> tuple[dict[str, Tensor], dict[str, BlockLayer]]:
    """Return the tensors of a file and its quantized layers by name. The codes of these are among the
    tensors, as their weights.

    Raises:
        MissingFileError, TruncatedFileError, ForeignFileError: see `gguf_header.read_header`; or something
            else than the weight of a linear layer is quantized.
        TensorMismatchError: a scale is not finite or zero, blocks are on no grid of ours, or a tensor is not
            of the shape that it had.
    """
    header = read_header(path)
    tensors: dict[str, Tensor] = {}
    layers: dict[str, BlockLayer] = {}
    for entry in header.entries:
        shape = _shape(path, entry, header.shapes)
        if entry.kind in FLOATS:
            tensors[entry.name] = _bytes(path, entry).view(FLOATS[entry.kind]).reshape(shape)
            continue
        layer = _layer(path, entry, shape)
        layers[entry.name.removesuffix(WEIGHT)], tensors[entry.name] = layer, layer.codes
    return dict(sorted(tensors.items())), layers


def _bytes(path: Path, entry: Entry) -> Tensor:
    """Return a copy of the bytes of a tensor."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8, count=entry.length, offset=entry.start))


def _shape(path: Path, entry: Entry, shapes: dict[str, Any]) -> tuple[int, ...]:
    """Return the shape that a tensor had: some writers flatten convolutions, and note theirs."""
    noted = shapes.get(entry.name, entry.shape)
    match noted:
        case (*sizes,) if all(type(size) is int and size > 0 for size in sizes):
            if prod(sizes) == prod(entry.shape):
                return tuple(sizes)
    raise TensorMismatchError(
        f"{path}: {cut(entry.name, LONGEST)} is {list(entry.shape)} and noted as {shown(noted)}; "
        "copy or download it again"
    )


def _layer(path: Path, entry: Entry, shape: tuple[int, ...]) -> BlockLayer:
    """Return a layer of blocks."""
    fmt, name = BLOCKS[entry.kind], cut(entry.name, LONGEST)
    if not entry.name.endswith(WEIGHT) or len(shape) != 2 or shape[1] % BLOCK:
        raise ForeignFileError(
            f"{path}: {name}, {list(shape)}, is {fmt.name}; weights of linear layers alone are read so, "
            f"with rows of whole blocks"
        )
    try:
        codes, scale, zero_point = from_blocks(_bytes(path, entry).reshape(shape[0], -1), fmt)
    except UnheldError as error:
        raise TensorMismatchError(
            f"{path}: {name} of {fmt.name} {error}, and no grid here is that"
        ) from error
    middle = bool((zero_point == fmt.middle).all())
    return BlockLayer(fmt.bits, codes, scale, None if middle else zero_point)
