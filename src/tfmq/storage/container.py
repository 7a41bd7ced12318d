"""The safetensors layout: what a header says, and what is wrong with a file that does not keep to it.

A file is eight bytes of header length (little-endian), the header (JSON: name to dtype, shape and data
offsets), and the tensors back to back. Reading goes through the safetensors library; it reports every defect
as one class, so the checks here run first and tell them apart. Writing is ours because the library orders
metadata at random, and refuses tensors that are strided or share memory.
"""

import json
import struct
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq.errors import shown

from .errors import ForeignFileError, MissingFileError, TruncatedFileError

__all__ = ["check_container", "encode_header", "file_order"]

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
# Bytes of a value of each dtype.
_SIZES = {name: dtype.itemsize for dtype, name in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")
# Bytes of a header. The format's own bound is 100 MB, and parsed that takes 25 times as much: no header of
# models has more than some of these, since a tensor takes a hundred bytes.
_HEADER_LIMIT = 2**24
_METADATA = "__metadata__"


def file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of their data: wider elements first, so that each tensor is aligned to
    its element, then by name.
    """
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def encode_header(tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes that precede the data of `tensors` laid out in `file_order`: equal for equal input,
    whatever the order of the mappings.

    Raises:
        ValueError: a tensor has a dtype the format lacks, or the reserved name `__metadata__`.
        TypeError: a metadata key or value is not a string.
    """
    if any(not isinstance(text, str) for pair in (metadata or {}).items() for text in pair):
        raise TypeError(f"metadata is {metadata!r}; safetensors takes strings for keys and values")
    header: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in file_order(tensors):
        tensor = tensors[name]
        if name == _METADATA or tensor.dtype not in _DTYPES:
            allowed = ", ".join(map(str, _DTYPES))
            raise ValueError(
                f"tensor {name!r} of {tensor.dtype} cannot be written; any "
                f"name but {_METADATA!r} can be, of {allowed}"
            )
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def check_container(path: Path) -> None:
    """Check that the file at `path` is whole and laid out as safetensors; offsets and shapes are left to the
    library.

    Raises:
        MissingFileError: there is no such file.
        TruncatedFileError: it ends before its declared length.
        ForeignFileError: it is not a regular file, not safetensors, or longer than its declared length.
    """
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; check the path, or save the checkpoint again")
    if not path.is_file():
        raise ForeignFileError(f"{path} is not a regular file; pass the safetensors file itself")
    size = path.stat().st_size
    header_length, header = _read_header(path, size=size)
    declared = _LENGTH.size + header_length + _data_length(path, header)
    if size < declared:
        raise TruncatedFileError(
            f"{path} has {size} bytes of the {declared} its header declares; copy or save it again"
        )
    if size > declared:
        raise ForeignFileError(
            f"{path} has {size - declared} bytes after the {declared} "
            "its header declares; copy or save it again"
        )


def _read_header(path: Path, *, size: int) -> tuple[int, dict[str, Any]]:
    """Return the length of the header and its content."""
    if size < _LENGTH.size:
        raise TruncatedFileError(
            f"{path} has {size} bytes, fewer than the {_LENGTH.size} "
            "of a header length; copy or save it again"
        )
    with path.open("rb") as stream:
        (length,) = _LENGTH.unpack(stream.read(_LENGTH.size))
        if length > _HEADER_LIMIT or stream.peek(1)[:1] not in (b"{", b""):
            raise ForeignFileError(
                f"{path} is not a safetensors file: its first {_LENGTH.size} "
                f"bytes are no header length ({length}; at most {_HEADER_LIMIT} bytes are read); "
                "pass a safetensors file"
            )
        if _LENGTH.size + length > size:
            raise TruncatedFileError(
                f"{path} has {size} bytes, its header alone declares "
                f"{_LENGTH.size + length}; copy or save it again"
            )
        text = stream.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ForeignFileError(
            f"{path} is not a safetensors file: its header is not JSON ({error}); pass a tfmq checkpoint"
        ) from error
    if not isinstance(header, dict):
        raise ForeignFileError(
            f"{path} is not a safetensors file: its header is a {type(header).__name__}, "
            "not an object; pass a tfmq checkpoint"
        )
    return length, header


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose names are there once; of one that is there twice readers take the one or the
    other.

    Raises:
        ValueError: a name is there twice; says which.
    """
    counts = Counter(name for name, _ in pairs)
    if len(counts) < len(pairs):
        raise ValueError(f"it has {shown(counts.most_common(1)[0][0])} twice")
    return dict(pairs)


def _check_size(path: Path, name: str, entry: dict[str, Any], size: int) -> None:
    """Check that `size` bytes are those of the dtype and the shape of an entry."""
    match entry.get("shape"):
        case [*widths] if all(type(width) is int and width >= 0 for width in widths):
            if size == prod(widths) * _SIZES[entry["dtype"]]:
                return
    raise ForeignFileError(
        f"{path} has an entry for tensor {shown(name)} whose {size} bytes are not those of "
        f"{entry['dtype']} {shown(entry.get('shape'))}; copy or save it again"
    )


def _data_length(path: Path, header: dict[str, Any]) -> int:
    """Return the bytes of data that `header` declares."""
    length = 0
    for name, entry in header.items():
        if name == _METADATA:
            continue
        match entry:
            case {"dtype": str(dtype), "data_offsets": [int(start), int(end)]} if dtype in _SIZES:
                _check_size(path, name, entry, end - start)
                length = max(length, end)
            case _:
                raise ForeignFileError(
                    f"{path} has no readable entry for tensor {shown(name)}: "
                    f"{shown(entry)}; pass a tfmq checkpoint"
                )
    return length
