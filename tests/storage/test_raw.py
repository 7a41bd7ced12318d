import sys

import numpy as np
import pytest
import torch

from tfmq.storage.raw import dtype_name, raw_bytes


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)])
@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.complex64],
)
def test_bytes_are_those_of_the_contiguous_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.arange(60).reshape(3, 4, 5)[0, 0].sum().expand(shape).to(dtype)
    expected = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    assert bytes(raw_bytes(tensor)) == expected


def test_transposed_parameter_conjugate_and_negative_views_are_resolved() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    assert bytes(raw_bytes(torch.nn.Parameter(matrix.T))) == np.ascontiguousarray(matrix.numpy().T).tobytes()
    number = torch.tensor([1 + 2j])
    assert bytes(raw_bytes(number.conj())) == np.array([1 - 2j], dtype=np.complex64).tobytes()
    assert bytes(raw_bytes(number.conj().imag)) == np.array([-2], dtype=np.float32).tobytes()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64, torch.complex64])
def test_big_endian_hosts_swap_each_number(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1, 2, 300]).to(dtype)
    monkeypatch.setattr(sys, "byteorder", "big")
    assert bytes(raw_bytes(tensor)) == tensor.numpy().byteswap().tobytes()


def test_tensors_without_values_are_refused() -> None:
    with pytest.raises(ValueError, match="meta"):
        raw_bytes(torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="sparse"):
        raw_bytes(torch.eye(2).to_sparse())


def test_dtype_names_are_short() -> None:
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
