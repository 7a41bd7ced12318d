"""GGUF files that lie, all seeded: reading ends in one of the documented errors, in no other and before
memory is taken, or with layers that can be computed.
"""

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from tfmq.storage.errors import (
    CheckpointError,
    ForeignFileError,
    MissingFileError,
    TensorMismatchError,
    TruncatedFileError,
)
from tfmq.storage.gguf import read_gguf

FOREIGN, WRONG, SHORT = ForeignFileError, TensorMismatchError, TruncatedFileError
F32, F16, Q4_0, Q4_1, Q8_0, BF16 = 0, 1, 2, 3, 8, 30


def text(value: str | bytes) -> bytes:
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def listed(kind: int, *values: int, letter: str = "i") -> bytes:
    return struct.pack("<IQ", kind, len(values)) + struct.pack(f"<{len(values)}{letter}", *values)


@dataclass(frozen=True)
class Tensor:
    name: str | bytes
    sizes: tuple[int, ...]
    kind: int
    data: bytes
    offset: int | None = None


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def blocks(scale: float, code: int = 17) -> bytes:
    """Return two rows of two blocks of Q8_0, the first block with another scale."""
    return b"".join(half(s) + bytes([code]) * 32 for s in (scale, 0.5, 0.25, 2.0))


def shifted(scale: float, start: float) -> bytes:
    return half(scale) + half(start) + bytes([0x97]) * 16


WHOLE = (
    Tensor("a.weight", (64, 2), Q8_0, blocks(1.0)),
    Tensor("a.bias", (2,), F32, struct.pack("<2f", 1, 2)),
    Tensor("b.weight", (32, 1), Q4_0, half(-0.5) + bytes(range(16))),
    Tensor("c.weight", (32, 1), Q4_1, shifted(0.5, -1.5)),
    Tensor("n", (3,), BF16, b"\x80\x3f" * 3),
    Tensor("k.weight", (4, 6), F16, half(1) * 24),
)
FIELDS = (
    pair("general.architecture", 8, text("flux")),
    pair("comfy.gguf.orig_shape.k.weight", 9, listed(5, 3, 2, 2, 2)),
    pair("tokenizer.list", 9, struct.pack("<IQ", 8, 40) + text("a") * 40),
    pair("numbers", 9, listed(6, *range(40), letter="I")),
    pair("flag", 7, b"\1"),
)


@dataclass(frozen=True)
class File:
    """The pieces of a file, and what it says of them where that is something else."""

    tensors: tuple[Tensor, ...] = WHOLE
    fields: tuple[bytes, ...] = FIELDS
    magic: bytes = b"GGUF"
    version: int = 3
    counts: dict[str, int] = field(default_factory=dict)
    rest: bytes = b""
    order: str = "<"
    alignment: int = 32

    def bytes(self) -> bytes:
        infos, data = b"", b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            sizes = struct.pack(f"<I{len(tensor.sizes)}Q", len(tensor.sizes), *tensor.sizes)
            infos += text(tensor.name) + sizes + struct.pack("<IQ", tensor.kind, offset)
            data += tensor.data + bytes(-len(tensor.data) % self.alignment)
        tensors = self.counts.get("tensors", len(self.tensors))
        fields = self.counts.get("fields", len(self.fields))
        head = self.magic + struct.pack(f"{self.order}IQQ", self.version, tensors, fields)
        head += b"".join(self.fields) + infos
        return head + bytes(-len(head) % self.alignment) + data + self.rest

    def changed(self, place: int, **changes: Any) -> "File":
        tensors = list(self.tensors)
        tensors[place] = replace(tensors[place], **changes)
        return replace(self, tensors=tuple(tensors))

    def with_field(self, *fields: bytes) -> "File":
        return replace(self, fields=(*self.fields, *fields))


def read(folder: Path, content: bytes) -> Any:
    path = folder / "f.gguf"
    path.write_bytes(content)
    return read_gguf(path)


def checked(folder: Path, content: bytes) -> None:
    """Read a file and, where it can be, see that its layers are what they say."""
    tensors, layers = read(folder, content)
    for name, layer in layers.items():
        stored, described = layer.stored(), layer.described()
        assert tensors[f"{name}.weight"] is layer.codes and layer.codes.dtype == torch.uint8
        assert bool((torch.isfinite(layer.scale) & (layer.scale > 0)).all())
        assert 32 * layer.scale.shape[1] == layer.codes.shape[1] == (sum(described["segments"]) or 32)
        assert ("zero_point" in stored) == (not described["symmetric"])


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    tensors, layers = read(tmp_path, File().bytes())
    checked(tmp_path, File().bytes())
    assert tensors.keys() == {tensor.name for tensor in WHOLE}
    assert layers["a"].scale.tolist() == [[1, 0.5], [0.25, 2]] and layers["a"].zero_point is None
    assert int(layers["a"].codes[0, 0]) == 128 + 17
    assert layers["b"].scale.item() == 0.5 and layers["b"].zero_point.item() == 7
    assert layers["c"].zero_point.item() == 3 and layers["c"].codes[0, [0, 16]].tolist() == [7, 9]
    assert tensors["k.weight"].shape == (3, 2, 2, 2) and tensors["n"].tolist() == [1, 1, 1]
    assert tensors["a.bias"].tolist() == [1, 2]
    aligned = File(alignment=256).with_field(pair("general.alignment", 4, struct.pack("<I", 256)))
    assert read(tmp_path, aligned.bytes())[1].keys() == layers.keys()


HUGE = 2**62
LIES: dict[str, tuple[File, type[Exception], str]] = {
    "another magic": (File(magic=b"GGML"), FOREIGN, "not a GGUF file"),
    "version 1": (File(version=1), FOREIGN, "GGUF version 1; 2 and 3"),
    "big-endian": (File(order=">"), FOREIGN, "bytes are big-endian"),
    "many tensors": (File(counts={"tensors": HUGE}), FOREIGN, "declares 4611686018427387904 tensors"),
    "many fields": (File(counts={"fields": HUGE}), FOREIGN, "4611686018427387904 fields"),
    "more tensors": (File(counts={"tensors": 60000}), Exception, "f.gguf"),
    "a key twice": (File().with_field(FIELDS[0]), FOREIGN, "has 'general.architecture' twice"),
    "a tensor twice": (File(tensors=(WHOLE[0], WHOLE[0])), FOREIGN, "has 'a.weight' twice"),
    "a text of terabytes": (
        File().with_field(pair("x", 8, struct.pack("<Q", 2**42))),
        SHORT,
        "its header 43980465",
    ),
    "a list of terabytes": (
        File().with_field(pair("x", 9, struct.pack("<IQ", 4, 2**42))),
        SHORT,
        "its header 175921",
    ),
    "a list of texts": (File().with_field(pair("x", 9, struct.pack("<IQ", 8, HUGE))), Exception, "f.gguf"),
    "a list of lists": (File().with_field(pair("x", 9, struct.pack("<IQ", 9, 1))), FOREIGN, "of type 9"),
    "a value of no type": (File().with_field(pair("x", 77, b"")), FOREIGN, "of type 77"),
    "a key of no text": (File().with_field(pair(b"\xff\xfe", 7, b"\0")), FOREIGN, "no UTF-8"),
    "a long name": (File().changed(1, name="x" * 2000), FOREIGN, "name of more than 1024 bytes"),
    "alignment zero": (
        File().with_field(pair("general.alignment", 4, bytes(4))),
        FOREIGN,
        "alignment 0, not",
    ),
    "alignment 24": (
        File().with_field(pair("general.alignment", 4, struct.pack("<I", 24))),
        FOREIGN,
        "alignment 24",
    ),
    "alignment a text": (File().with_field(pair("general.alignment", 8, text("32"))), FOREIGN, "alignment"),
    "many axes": (File().changed(1, sizes=(1,) * 9), FOREIGN, "9 axes of 'a.bias'"),
    "no elements": (File().changed(1, sizes=(2, 0)), FOREIGN, "no elements of 'a.bias'"),
    "terabytes": (File().changed(5, sizes=(2**40,)), SHORT, "'k.weight' needs 2199"),
    "a product beyond 64 bits": (File().changed(5, sizes=(HUGE, HUGE, 4)), SHORT, "'k.weight' needs"),
    "overlapping": (File().changed(1, offset=32), FOREIGN, "has 'a.bias' at 32 of its data, where 160"),
    "a hole": (File().changed(1, offset=320), FOREIGN, "'a.bias' at 320"),
    "far away": (File().changed(1, offset=2**63), FOREIGN, "'a.bias' at 922337"),
    "bytes behind": (File(rest=bytes(64)), FOREIGN, "64 bytes after"),
    "k-quants": (File().changed(0, kind=12), FOREIGN, "1 tensors of Q4_K, such as 'a.weight'; F32"),
    "iq": (File().changed(0, kind=20), FOREIGN, "IQ4_NL"),
    "integers": (File().changed(1, kind=26), FOREIGN, "I32, such as 'a.bias'"),
    "doubles": (File().changed(1, kind=28), FOREIGN, "F64"),
    "a type of tomorrow": (File().changed(0, kind=99), FOREIGN, "the unknown type 99"),
    "rows of half a block": (File().changed(0, sizes=(16, 8)), FOREIGN, "no blocks of Q8_0"),
    "a vector of blocks": (File().changed(0, sizes=(128,)), FOREIGN, "weights of linear layers alone"),
    "a convolution of blocks": (File().changed(0, sizes=(32, 2, 2)), FOREIGN, "linear layers alone"),
    "a bias of blocks": (File().changed(0, name="a.bias_"), FOREIGN, "linear layers alone"),
    "scale NaN": (File().changed(0, data=blocks(float("nan"))), WRONG, "a.weight of Q8_0 has a scale that"),
    "scale infinite": (File().changed(0, data=blocks(float("inf"))), WRONG, "not finite"),
    "scale zero": (File().changed(0, data=blocks(0.0)), WRONG, "has a scale of zero"),
    "start NaN": (File().changed(3, data=shifted(0.5, float("nan"))), WRONG, "c.weight of Q4_1 .*finite"),
    "start between": (File().changed(3, data=shifted(0.5, -1.25)), WRONG, "no whole multiple"),
    "start above": (File().changed(3, data=shifted(0.5, 0.5)), WRONG, "no whole multiple"),
    "start far below": (File().changed(3, data=shifted(0.5, -8.0)), WRONG, "no whole multiple"),
    "scale zero, start not": (File().changed(3, data=shifted(0.0, -1.5)), WRONG, "no whole multiple"),
    "another shape noted": (
        File().with_field(pair("comfy.gguf.orig_shape.n", 9, listed(5, 2, 2))),
        WRONG,
        r"n is \[3\] and noted as \(2, 2\)",
    ),
    "a negative shape noted": (
        File().with_field(pair("comfy.gguf.orig_shape.n", 9, listed(5, -3, -1))),
        WRONG,
        "noted as",
    ),
    "a text noted": (File().with_field(pair("comfy.gguf.orig_shape.n", 8, text("3"))), WRONG, "noted as"),
    "a long shape noted": (
        File().with_field(pair("comfy.gguf.orig_shape.n", 9, listed(5, *[1] * 30))),
        WRONG,
        "noted as None",
    ),
}
LIES["another dtype"] = (File().changed(1, kind=BF16, sizes=(64,)), FOREIGN, "'b.weight' at 192 of its data")


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_name_before_memory_is_taken(lie: str, tmp_path: Path) -> None:
    file, error, message = LIES[lie]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=message) as caught:
            read(tmp_path, file.bytes())
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()
    assert isinstance(caught.value, error)
    assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 1000


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="does not exist"):
        read_gguf(tmp_path / "none.gguf")
    with pytest.raises(ForeignFileError, match="not a regular file"):
        read_gguf(tmp_path)
    with pytest.raises(TruncatedFileError, match="has 0 bytes"):
        read(tmp_path, b"")
    with pytest.raises(ForeignFileError, match="not a GGUF file"):
        read(tmp_path, b"PK\x03\x04" + bytes(100))


def test_a_header_of_gigabytes_is_refused(tmp_path: Path) -> None:
    """The file is as long as it says, and its disk blocks are none."""
    path = tmp_path / "f.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + text("x") + struct.pack("<IQ", 8, 2**32)
    with path.open("wb") as stream:
        stream.write(head)
        stream.truncate(2**33)
    with pytest.raises(ForeignFileError, match="header of more than 100000000 bytes"):
        read_gguf(path)


DAMAGE: tuple[Callable[[bytearray, Random], None], ...] = (
    lambda content, chance: content.__delitem__(slice(chance.randrange(len(content)), None)),
    lambda content, chance: content.__setitem__(
        place := chance.randrange(len(content)), content[place] ^ 1 << chance.randrange(8)
    ),
    lambda content, chance: content.__setitem__(
        slice(place := chance.randrange(4, len(content)), place + 8), chance.randbytes(8)
    ),
)


def test_damage_is_refused_or_harmless(tmp_path: Path) -> None:
    """Bytes that are missing, bits that flip and pieces that are exchanged, two hundred of each."""
    content, chance, refused = File().bytes(), Random(21), 0
    for case in range(600):
        changed = bytearray(content)
        DAMAGE[case % 3](changed, chance)
        try:
            checked(tmp_path, bytes(changed))
        except CheckpointError:
            refused += 1
    assert refused > 350
