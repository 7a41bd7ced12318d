import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from tfmq.storage import CheckpointError, ForeignFileError, MissingFileError, TruncatedFileError, read_tensors
from tfmq.storage.container import check_container, encode_header, file_order

TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([1, 2, 3], dtype=torch.uint8)}
GOOD = save(TENSORS, metadata={"key": "value"})
HEADER = struct.unpack("<Q", GOOD[:8])[0]
DATA = 8 + HEADER


def with_header(text: bytes, *, data: bytes = GOOD[DATA:]) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: object) -> bytes:
    return with_header(
        json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]} | changes}).encode(),
        data=b"abc",
    )


MALFORMED: dict[str, tuple[bytes, type[CheckpointError]]] = {
    "empty": (b"", TruncatedFileError),
    "seven bytes": (GOOD[:7], TruncatedFileError),
    "header length only": (GOOD[:8], TruncatedFileError),
    "header cut": (GOOD[: DATA - 3], TruncatedFileError),
    "header length beyond the file": (struct.pack("<Q", 9_000_000) + GOOD[8:], TruncatedFileError),
    "header length beyond the format": (struct.pack("<Q", 2**40) + GOOD[8:], ForeignFileError),
    "header length of all ones": (b"\xff" * 8 + GOOD[8:], ForeignFileError),
    "header length zero": (with_header(b""), ForeignFileError),
    "header length one short": (struct.pack("<Q", HEADER - 1) + GOOD[8:], ForeignFileError),
    "no data": (GOOD[:DATA], TruncatedFileError),
    "last byte cut": (GOOD[:-1], TruncatedFileError),
    "byte after the end": (GOOD + b"\0", ForeignFileError),
    "header not JSON": (with_header(b"x" * HEADER), ForeignFileError),
    "header not closed": (with_header(b"{" * HEADER), ForeignFileError),
    "header not UTF-8": (with_header(b'{"\xff":1}'), ForeignFileError),
    "header nested too deep": (with_header(b'{"a":' + b"[" * 100_000), ForeignFileError),
    "header a list": (with_header(b"[]", data=b""), ForeignFileError),
    "header of another schema": (with_header(b'{"a":1}', data=b""), ForeignFileError),
    "dtype unknown": (entry(dtype="F6_E2M3"), ForeignFileError),
    "dtype of another size": (entry(dtype="F32"), ForeignFileError),
    "shape of another size": (entry(shape=[4]), ForeignFileError),
    "shape negative": (entry(shape=[-3]), ForeignFileError),
    "offsets with a hole": (entry(data_offsets=[1, 3], shape=[2]), ForeignFileError),
    "offsets reversed": (entry(data_offsets=[3, 0]), ForeignFileError),
    "offsets not numbers": (entry(data_offsets=["0", "3"]), ForeignFileError),
    "offsets missing": (entry(data_offsets=None), ForeignFileError),
    "offsets beyond the file": (entry(data_offsets=[0, 2**60], shape=[2**60]), TruncatedFileError),
    "metadata not strings": (with_header(b'{"__metadata__":{"a":1}}', data=b""), ForeignFileError),
    "pickle": (pickle.dumps({"weight": list(range(100))}), ForeignFileError),
    "zip": (b"PK\x03\x04" + bytes(200), ForeignFileError),
    "large file pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ForeignFileError),
    "JSON": (b'{\n "format": "tfmq"\n}\n', ForeignFileError),
}


@pytest.mark.parametrize("shape", [[4], [-3], [True], "3", None, [2**70]])
def test_a_tensor_of_another_size_is_named(tmp_path: Path, shape: Any) -> None:
    content = entry(shape=shape)
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(ForeignFileError, match="entry for tensor 'a' whose 3 bytes are not those of U8"):
        read_tensors(path)


@pytest.mark.parametrize("name", MALFORMED)
def test_each_malformed_file_has_its_error(tmp_path: Path, name: str) -> None:
    content, error = MALFORMED[name]
    path = tmp_path / "file.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"file\.safetensors .*; (copy|pass|save)") as caught:
        read_tensors(path)
    assert caught.type is error


def test_missing_files_and_directories(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="absent"):
        read_tensors(tmp_path / "absent")
    with pytest.raises(ForeignFileError, match="not a regular file"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("length", range(len(GOOD)))
def test_every_prefix_is_truncated(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(GOOD[:length])
    with pytest.raises(TruncatedFileError):
        check_container(path)


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    path.write_bytes(GOOD)
    tensors, metadata = read_tensors(path)
    assert list(tensors) == ["a", "b"]
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert metadata == {"key": "value"}


def test_headers_agree_with_the_library() -> None:
    header = encode_header(TENSORS, metadata={"key": "value"})
    assert header == GOOD[:DATA]
    assert file_order(TENSORS) == ["b", "a"]


def test_every_dtype_is_read_back_by_the_library() -> None:
    names = ["bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"]
    names += ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32", "float64", "complex64"]
    tensors = {name: torch.zeros(3, dtype=getattr(torch, name)) for name in names}
    size = sum(tensor.nbytes for tensor in tensors.values())
    loaded = load(encode_header(tensors) + bytes(size))
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {
        name: tensor.dtype for name, tensor in tensors.items()
    }


def test_what_the_format_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'x' of torch\.complex128"):
        encode_header({"x": torch.zeros(1, dtype=torch.complex128)})
    with pytest.raises(ValueError, match="__metadata__"):
        encode_header({"__metadata__": torch.zeros(1)})
    with pytest.raises(TypeError, match="metadata is"):
        encode_header({}, metadata={"key": 1})  # type: ignore[dict-item]
