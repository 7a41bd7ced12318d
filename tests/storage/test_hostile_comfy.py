"""Files of int8 layers that lie, all seeded: reading ends in one of the documented errors, in no other and
before memory is taken, or with layers that can be computed.
"""

import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.storage.atomic import read_tensors, write_tensors
from tfmq.storage.comfy import Int8Layer, encoded, split_layers
from tfmq.storage.errors import (
    CheckpointError,
    ForeignFileError,
    TensorMismatchError,
    TruncatedFileError,
)

ROWS, WIDTH = 6, 64
Tensors = dict[str, Tensor]


def mark(described: Any) -> Tensor:
    text = described if isinstance(described, bytes) else json.dumps(described).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


@pytest.fixture
def whole() -> Tensors:
    generator = torch.Generator().manual_seed(1)

    def codes() -> Tensor:
        return torch.randint(-128, 128, (ROWS, WIDTH), generator=generator, dtype=torch.int8)

    scale = torch.rand(ROWS, 1, generator=generator) + 0.1
    tensors: Tensors = {"norm.weight": torch.ones(WIDTH), "a.bias": torch.zeros(ROWS)}
    for name, layer in {"a": Int8Layer(codes(), scale, 64), "b": Int8Layer(codes(), scale)}.items():
        tensors |= {name + suffix: tensor for suffix, tensor in encoded(layer).items()}
    tensors["c.weight"] = torch.rand(ROWS, WIDTH, generator=generator).to(torch.float8_e4m3fn)
    tensors |= {"c.weight_scale": torch.tensor(0.5), "c.comfy_quant": mark({"format": "float8_e4m3fn"})}
    return tensors


def read(path: Path) -> tuple[Tensors, dict[str, Int8Layer]]:
    return split_layers(*read_tensors(path), source=path)


def checked(path: Path) -> None:
    """Read a file and, where it can be, see that its layers are what they say."""
    tensors, layers = read(path)
    for name, layer in layers.items():
        assert layer.codes.dtype == torch.int8 and tensors[f"{name}.weight"] is layer.codes
        assert layer.scale.shape == (len(layer.codes), 1) and bool((layer.scale > 0).all())
        assert bool(torch.isfinite(layer.scale).all())
        assert layer.rotated == 0 or layer.codes.shape[1] % layer.rotated == 0
    assert not any(name.endswith((".comfy_quant", ".weight_scale")) for name in tensors)


def test_a_whole_file_is_read(whole: Tensors, tmp_path: Path) -> None:
    write_tensors(tmp_path / "f.safetensors", whole)
    tensors, layers = read(tmp_path / "f.safetensors")
    assert {name: layer.rotated for name, layer in layers.items()} == {"a": 64, "b": 0}
    assert torch.equal(layers["a"].codes, whole["a.weight"])
    assert torch.equal(tensors["c.weight"], whole["c.weight"].float() / 2)
    checked(tmp_path / "f.safetensors")


def replaced(name: str, value: Any) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name] = value if isinstance(value, Tensor) else value(tensors[name])

    return change


def described(**fields: Any) -> Callable[[Tensors], None]:
    form = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64, **fields}
    return replaced("a.comfy_quant", mark(form))


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    def change(scale: Tensor) -> Tensor:
        scale = scale.clone()
        scale[3] = value
        return scale

    return change


FOREIGN, WRONG = ForeignFileError, TensorMismatchError
LIES: dict[str, tuple[Callable[[Tensors], object], type[Exception], str]] = {
    "scale NaN": (
        replaced("a.weight_scale", spoiled(float("nan"))),
        WRONG,
        "a.weight_scale has a scale that is not positive and finite: nan in row 3",
    ),
    "a field twice": (
        replaced(
            "a.comfy_quant",
            mark(b'{"format": "int8_tensorwise", "convrot_groupsize": 64, "convrot_groupsize": 256}'),
        ),
        FOREIGN,
        "'convrot_groupsize' twice",
    ),
    "scale infinite": (replaced("a.weight_scale", spoiled(float("inf"))), WRONG, "not positive and finite"),
    "scale zero": (replaced("a.weight_scale", spoiled(0.0)), WRONG, "not positive and finite"),
    "scale negative": (replaced("b.weight_scale", spoiled(-1.0)), WRONG, "b.weight_scale"),
    "scale of float8 NaN": (replaced("c.weight_scale", torch.tensor(float("nan"))), WRONG, "c.weight_scale"),
    "scale too short": (replaced("a.weight_scale", torch.ones(ROWS - 1, 1)), WRONG, r"\[5, 1\]"),
    "scale of integers": (replaced("a.weight_scale", torch.ones(ROWS, dtype=torch.int32)), WRONG, "int32"),
    "scale missing": (lambda t: t.pop("a.weight_scale"), WRONG, "a.weight_scale is missing"),
    "scale of blocks": (replaced("a.weight_scale", torch.ones(ROWS, 2)), WRONG, r"\[6, 2\]"),
    "weight missing": (lambda t: t.pop("a.weight"), WRONG, "a.weight is missing"),
    "weight of floats": (replaced("a.weight", torch.ones(ROWS, WIDTH)), WRONG, "float32"),
    "weight of bytes": (replaced("b.weight", lambda w: w.view(torch.uint8)), WRONG, "uint8"),
    "weight with axes": (replaced("a.weight", lambda w: w[:, :, None, None]), WRONG, "not a matrix"),
    "weight empty": (replaced("a.weight", torch.zeros(ROWS, 0, dtype=torch.int8)), WRONG, "not a matrix"),
    "weight a number": (replaced("a.weight", torch.tensor(3, dtype=torch.int8)), WRONG, "not a matrix"),
    "group does not divide": (described(convrot_groupsize=256), FOREIGN, "rotates 256 .* do not divide 64"),
    "group no power of four": (described(convrot_groupsize=32), FOREIGN, "group size 32"),
    "group of one": (described(convrot_groupsize=1), FOREIGN, "group size 1,"),
    "group negative": (described(convrot_groupsize=-64), FOREIGN, "group size -64"),
    "group of bits": (described(convrot_groupsize=4**5000), FOREIGN, "an integer of 10001 bits"),
    "group of text": (described(convrot_groupsize="64"), FOREIGN, "group size '64'"),
    "group true": (described(convrot_groupsize=True), FOREIGN, "group size True"),
    "flag a number": (described(convrot=1), FOREIGN, "flags are not true or false"),
    "another format": (described(format="nvfp4"), FOREIGN, "has the format 'nvfp4'; int8_tensorwise"),
    "format a list": (described(format=["int8_tensorwise"]), FOREIGN, "has the format"),
    "no format": (replaced("a.comfy_quant", mark({"convrot": True})), FOREIGN, "has the format None"),
    "a list": (replaced("a.comfy_quant", mark([1])), FOREIGN, "not an object"),
    "no JSON": (replaced("a.comfy_quant", mark(b"{\xff")), FOREIGN, "is not JSON"),
    "deep JSON": (replaced("a.comfy_quant", mark(b"[" * 4000)), FOREIGN, "is not JSON"),
    "an empty mark": (replaced("a.comfy_quant", mark(b"")), FOREIGN, "is not JSON"),
    "a long mark": (replaced("a.comfy_quant", mark(b" " * 5000)), WRONG, "at most 4096 bytes"),
    "a mark of floats": (replaced("a.comfy_quant", torch.zeros(4)), WRONG, "at most 4096 bytes"),
    "no mark": (lambda t: t.pop("b.comfy_quant"), WRONG, "b.weight.* that nothing describes"),
    "a second scale": (lambda t: t.update({"a.weight_scale_2": torch.ones(())}), WRONG, "weight_scale_2"),
    "float8 of floats": (replaced("c.weight", torch.ones(ROWS, WIDTH)), WRONG, "c.weight is torch.float32"),
    "float8 NaN": (
        replaced("c.weight", torch.full((ROWS, WIDTH), 127, dtype=torch.uint8)),
        WRONG,
        "not finite",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_by_name(lie: str, whole: Tensors, tmp_path: Path) -> None:
    change, error, message = LIES[lie]
    change(whole)
    path = tmp_path / "f.safetensors"
    write_tensors(path, whole)
    with pytest.raises(error, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


HEADERS: dict[str, tuple[str, str]] = {
    "no JSON": ("{", "is not JSON"),
    "no layers": ('{"format_version": "1.0"}', "not an object with layers"),
    "a list": ("[]", "not an object with layers"),
    "another layer": ('{"layers": {"d": {"format": "int8_tensorwise"}}}', "d.weight is missing"),
    "another format": ('{"layers": {"a": {"format": "mxfp8"}}}', "beside it and"),
    "a number": ('{"layers": {"d": 3}}', "is 3, not an object"),
    "deep": ("[" * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_lies_of_the_header_are_refused_by_name(header: str, whole: Tensors, tmp_path: Path) -> None:
    text, message = HEADERS[header]
    path = tmp_path / "f.safetensors"
    write_tensors(path, whole, metadata={"_quantization_metadata": text})
    with pytest.raises(CheckpointError, match=message):
        read(path)


def framed(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def pickled() -> bytes:
    """Return what torch.save of old and new wrote."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n(S'true'\ntR.")
    return stream.getvalue()


ENTRY = '"x":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}'
CONTENTS: dict[str, tuple[bytes, type[Exception], str]] = {
    "empty": (b"", TruncatedFileError, "0 bytes"),
    "short": (b"\0" * 5, TruncatedFileError, "5 bytes"),
    "pickle in a zip": (pickled(), ForeignFileError, "not a safetensors file"),
    "pickle": (b"\x80\x02cos\nsystem\n(S'true'\ntR." + bytes(64), ForeignFileError, "not a safetensors file"),
    "a header of gigabytes": (struct.pack("<Q", 2**33) + b"{", ForeignFileError, "length .8589934592"),
    "a header of lists": (
        framed(b'{"a":[' + b"[]," * 2**23 + b"[]]}"),
        ForeignFileError,
        "at most 16777216 bytes are read",
    ),
    "a header beyond the file": (struct.pack("<Q", 2**20) + b"{", TruncatedFileError, "declares 1048584"),
    "a key twice": (framed(f"{{{ENTRY},{ENTRY}}}".encode(), bytes(4)), ForeignFileError, "it has 'x' twice"),
    "a field twice": (
        framed(b'{"x":{"dtype":"I8","dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        ForeignFileError,
        "it has 'dtype' twice",
    ),
    "overlapping": (
        framed(f'{{{ENTRY},"y":{{"dtype":"I8","shape":[4],"data_offsets":[2,6]}}}}'.encode(), bytes(6)),
        ForeignFileError,
        "not a valid safetensors file",
    ),
    "a hole": (
        framed(f'{{{ENTRY},"y":{{"dtype":"I8","shape":[4],"data_offsets":[8,12]}}}}'.encode(), bytes(12)),
        ForeignFileError,
        "not a valid safetensors file",
    ),
    "terabytes": (
        framed(b'{"x":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}', bytes(4)),
        TruncatedFileError,
        "4398046511",
    ),
    "a product beyond 64 bits": (
        framed(b'{"x":{"dtype":"I8","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}', bytes(4)),
        ForeignFileError,
        "'x' whose 4 bytes are not those of",
    ),
    "negative offsets": (
        framed(b'{"x":{"dtype":"I8","shape":[4],"data_offsets":[-4,0]}}'),
        ForeignFileError,
        "not a valid safetensors file",
    ),
    "another shape": (
        framed(b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        ForeignFileError,
        "'x' whose 4 bytes are not those of",
    ),
    "an unknown dtype": (
        framed(b'{"x":{"dtype":"Q4","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        ForeignFileError,
        "no readable entry",
    ),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_containers_that_lie_are_refused_before_memory_is_taken(case: str, tmp_path: Path) -> None:
    content, error, message = CONTENTS[case]
    path = tmp_path / "f.safetensors"
    path.write_bytes(content)
    with pytest.raises(error, match=message):
        read(path)


def test_damage_is_refused_or_harmless(whole: Tensors, tmp_path: Path) -> None:
    """Bits that flip, bytes that are missing, and pieces that are exchanged, a few hundred of each."""
    path, chance = tmp_path / "f.safetensors", Random(20)
    write_tensors(path, whole)
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    refused = 0
    for case in range(600):
        changed = bytearray(content)
        if case % 3 == 0:
            place = chance.randrange(8 * header)
            changed[place // 8] ^= 1 << place % 8
        elif case % 3 == 1:
            del changed[chance.randrange(len(changed)) :]
        else:
            place, length = chance.randrange(8, header), chance.randrange(1, 12)
            changed[place : place + length] = chance.randbytes(length)
        path.write_bytes(changed)
        try:
            checked(path)
        except CheckpointError:
            refused += 1
    assert refused > 500
