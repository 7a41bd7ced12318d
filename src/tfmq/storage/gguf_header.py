"""The layout of GGUF: what a header says, and what is wrong with a file that does not keep to it.

A file is the magic number, a version, two counts, the metadata (key, type, value), the tensors (name, sizes
from the innermost on, type, offset), and the data, each tensor at a multiple of the alignment. The reader of
the package `gguf` takes every count at its word, so that headers are read here, within limits. Tests compare
with it.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from tfmq.errors import shown

from .errors import ForeignFileError, MissingFileError, TruncatedFileError

__all__ = ["Entry", "Header", "read_header"]

MAGIC = b"GGUF"
# Versions of GGUF that are read.
VERSIONS = (2, 3)
ALIGNMENT, ORIGINAL_SHAPE = "general.alignment", "comfy.gguf.orig_shape."
# Far more than any file has: bytes of the header, tensors or fields, bytes of a name, axes, bytes between.
HEADER_LIMIT, MOST, LONGEST_NAME, MOST_AXES, MOST_ALIGNED = 10**8, 2**16, 1024, 8, 2**16
# Most bytes of a text and most items of a list that are kept of the metadata. A longer one reads as None.
LONGEST_TEXT, LONGEST_LIST = 4096, 16
# Types of metadata as struct spells them; a text and an array are none.
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
# Numbers of the types text, array and uint32.
TEXT, ARRAY, UNSIGNED = 8, 9, 4
# Elements and bytes of a block of the types that are read, and the names of the others.
READ: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    30: ("BF16", 1, 2),
}
OTHERS = {
    **{6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"},
    **{15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M"},
    **{34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its name, its type, its shape, outermost axis first, and where its bytes are."""

    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file, and the shapes that tensors had before they were flattened, by name."""

    entries: tuple[Entry, ...]
    shapes: dict[str, Any]


@dataclass
class _Cursor:
    """A place in the header of a file of `size` bytes."""

    source: Path
    data: mmap.mmap
    size: int
    place: int = 0
    seen: set[str] = field(default_factory=set)

    def foreign(self, found: str) -> ForeignFileError:
        return ForeignFileError(f"{self.source} {found}; copy or download it again")

    def skip(self, count: int) -> int:
        """Step over bytes, and return where they begin."""
        place, self.place = self.place, self.place + count
        if self.place > self.size:
            raise TruncatedFileError(
                f"{self.source} has {self.size} bytes, its header {shown(self.place)} or more; "
                "copy or download it again"
            )
        if self.place > HEADER_LIMIT:
            raise self.foreign(f"has a header of more than {HEADER_LIMIT} bytes")
        return place

    def number(self, kind: str) -> Any:
        layout = struct.Struct("<" + kind)
        return layout.unpack_from(self.data, self.skip(layout.size))[0]

    def text(self, most: int) -> str | None:
        """Return a text, or None where it has more than `most` bytes."""
        length = self.number("Q")
        place = self.skip(length)
        if length > most:
            return None
        try:
            return self.data[place : place + length].decode()
        except UnicodeDecodeError as error:
            raise self.foreign(f"has a text at {place} that is no UTF-8") from error

    def name(self) -> str:
        """Return a name, which none before had."""
        found = self.text(LONGEST_NAME)
        if found is None:
            raise self.foreign(f"has a name of more than {LONGEST_NAME} bytes")
        if found in self.seen:
            raise self.foreign(f"has {shown(found)} twice")
        self.seen.add(found)
        return found

    def value(self) -> tuple[int, Any]:
        """Return the type of a value of the metadata and the value, None for one that is long."""
        kind = self.number("I")
        if kind != ARRAY:
            return kind, self._item(kind)
        inner, count = self.number("I"), self.number("Q")
        if inner in SCALARS and count > LONGEST_LIST:
            self.skip(count * struct.calcsize("<" + SCALARS[inner]))
            return kind, None
        # Whatever the count, each item steps over bytes of the header.
        first: list[Any] = []
        for _ in range(count):
            first = [*first, self._item(inner)][: LONGEST_LIST + 1]
        return kind, tuple(first) if len(first) <= LONGEST_LIST else None

    def _item(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text(LONGEST_TEXT)
        if kind not in SCALARS:
            raise self.foreign(f"has a value of type {kind} in its metadata, which is not read")
        return self.number(SCALARS[kind])


def read_header(path: Path) -> Header:
    """Return what the file at `path` holds, all of which is there and nothing else.

    Raises:
        MissingFileError: there is no such file.
        TruncatedFileError: it ends before what its header declares.
        ForeignFileError: it is no regular file, not GGUF, of another version or byte order; a name is there
            twice, a tensor is of a type that is not read, of an impossible shape, or not where the one before
            it ends.
    """
    if not path.exists():
        raise MissingFileError(f"{path} does not exist; check the path")
    if not path.is_file():
        raise ForeignFileError(f"{path} is not a regular file; pass the GGUF file itself")
    size = path.stat().st_size
    if size < len(MAGIC):
        raise TruncatedFileError(f"{path} has {size} bytes; copy or download it again")
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _header(_Cursor(path, data, size))


def _header(cursor: _Cursor) -> Header:
    place = cursor.skip(len(MAGIC))
    if cursor.data[place : len(MAGIC)] != MAGIC:
        raise cursor.foreign("is not a GGUF file")
    version = cursor.number("I")
    if version not in VERSIONS:
        order = " (its bytes are big-endian)" if version & 0xFFFF == 0 else ""
        raise cursor.foreign(f"is of GGUF version {version}{order}; 2 and 3 are read, little-endian")
    tensors, fields = cursor.number("Q"), cursor.number("Q")
    if max(tensors, fields) > MOST:
        raise cursor.foreign(f"declares {tensors} tensors and {fields} fields; {MOST} are read at most")
    alignment, shapes = _metadata(cursor, fields)
    cursor.seen.clear()
    declared = [_declared(cursor) for _ in range(tensors)]
    _check_types(cursor, declared)
    return Header(tuple(_placed(cursor, declared, alignment)), shapes)


def _metadata(cursor: _Cursor, fields: int) -> tuple[int, dict[str, Any]]:
    """Return the alignment, and the shapes of flattened tensors."""
    alignment, shapes = 32, {}
    for _ in range(fields):
        key = cursor.name()
        kind, value = cursor.value()
        if key == ALIGNMENT:
            if kind != UNSIGNED or not 1 <= value <= MOST_ALIGNED or value & (value - 1):
                raise cursor.foreign(f"has the alignment {shown(value)}, not a power of two")
            alignment = value
        elif key.startswith(ORIGINAL_SHAPE):
            shapes[key.removeprefix(ORIGINAL_SHAPE)] = value
    return alignment, shapes


def _declared(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return a tensor's name, shape, type and offset as the header has them."""
    name, axes = cursor.name(), cursor.number("I")
    if axes > MOST_AXES:
        raise cursor.foreign(f"has {axes} axes of {shown(name)}")
    shape = tuple(reversed([cursor.number("Q") for _ in range(axes)]))
    if 0 in shape:
        raise cursor.foreign(f"has no elements of {shown(name)}, {list(shape)}")
    return name, shape, cursor.number("I"), cursor.number("Q")


def _check_types(cursor: _Cursor, declared: list[tuple[str, tuple[int, ...], int, int]]) -> None:
    """Refuse types that are not exactly ours, by name."""
    strange: dict[int, list[str]] = {}
    for name, _, kind, _ in declared:
        if kind not in READ:
            strange.setdefault(kind, []).append(name)
    if strange:
        named = {OTHERS.get(kind, f"the unknown type {kind}"): names for kind, names in strange.items()}
        found = "; ".join(
            f"{len(names)} tensors of {title}, such as {shown(names[0])}"
            for title, names in list(named.items())[:3]
        )
        known = ", ".join(name for name, _, _ in READ.values())
        raise ForeignFileError(f"{cursor.source} has {found}; {known} are read")


def _placed(
    cursor: _Cursor, declared: list[tuple[str, tuple[int, ...], int, int]], alignment: int
) -> Iterator[Entry]:
    """Yield the tensors with the bytes that they have, which follow each other."""
    data, end = _aligned(cursor.place, alignment), 0
    for name, shape, kind, offset in declared:
        title, block, size = READ[kind]
        if block > 1 and (not shape or shape[-1] % block):
            raise cursor.foreign(
                f"has rows of {shown(name)}, {shown(list(shape))}, that are no blocks of {title}"
            )
        length = prod(shape) // block * size
        if offset != end:
            raise cursor.foreign(
                f"has {shown(name)} at {offset} of its data, where {end} follows the tensor before it"
            )
        if data + offset + length > cursor.size:
            raise TruncatedFileError(
                f"{cursor.source} has {cursor.size} bytes, of which {shown(name)} needs "
                f"{shown(data + offset + length)}; copy or download it again"
            )
        yield Entry(name, title, shape, data + offset, length)
        end = _aligned(offset + length, alignment)
    if cursor.size > data + end:
        raise cursor.foreign(f"has {cursor.size - data - end} bytes after those that its header declares")


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment
