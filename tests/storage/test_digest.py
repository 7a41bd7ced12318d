import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.storage import MissingFileError, file_digest, tensor_digest

TENSORS = {
    "b": torch.arange(6.0).reshape(2, 3),
    "a": torch.tensor([1, 2], dtype=torch.uint8),
    "c": torch.tensor(1.5),
}


def test_canonical_form_is_stable() -> None:
    expected = (
        b'["a", "uint8", [2]]\n' + bytes([1, 2]) + b'["c", "float32", []]\n' + bytes([0, 0, 0xC0, 0x3F])
    )
    assert tensor_digest({"c": TENSORS["c"], "a": TENSORS["a"]}) == hashlib.sha256(expected).hexdigest()


@given(st.permutations(sorted(TENSORS)))
def test_order_does_not_matter(names: list[str]) -> None:
    assert tensor_digest({name: TENSORS[name] for name in names}) == tensor_digest(TENSORS)


def test_strides_sharing_and_gradients_do_not_matter() -> None:
    base = TENSORS["b"]
    strided = torch.stack([base, base], dim=-1)[..., 1]
    assert not strided.is_contiguous()
    expected = tensor_digest({"x": base, "y": base.clone()})
    assert tensor_digest({"x": base, "y": base}) == expected
    assert tensor_digest({"x": strided, "y": torch.nn.Parameter(strided)}) == expected
    assert tensor_digest({"x": base.T.contiguous().T, "y": base}) == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_device_does_not_matter() -> None:
    assert tensor_digest({name: tensor.cuda() for name, tensor in TENSORS.items()}) == tensor_digest(TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        {"renamed": torch.zeros(2, 3)},
        {"x": torch.zeros(2, 3, dtype=torch.int32)},
        {"x": torch.zeros(3, 2)},
        {"x": torch.zeros(6)},
        {"x": -torch.zeros(2, 3)},
        {"x": torch.zeros(2, 3), "y": torch.zeros(0)},
        {},
    ],
)
def test_name_dtype_shape_value_and_count_matter(changed: dict[str, torch.Tensor]) -> None:
    assert tensor_digest(changed) != tensor_digest({"x": torch.zeros(2, 3)})


@given(st.integers(0, 5), st.integers(0, 31))
def test_every_bit_matters(index: int, bit: int) -> None:
    flipped = TENSORS["b"].clone()
    flipped.view(torch.int32).view(-1)[index] ^= -(2**31) if bit == 31 else 2**bit
    assert tensor_digest({**TENSORS, "b": flipped}) != tensor_digest(TENSORS)


def test_file_digest_is_that_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert file_digest(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(MissingFileError, match="absent"):
        file_digest(tmp_path / "absent")
