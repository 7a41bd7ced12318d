import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.numerics.packing import pack_unsigned, packed_shape, unpack_unsigned

BITS = st.integers(1, 8)
SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64])


def draw(shape: tuple[int, ...], *, bits: int, seed: int) -> torch.Tensor:
    return torch.randint(2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def oracle(values: torch.Tensor, *, bits: int) -> np.ndarray:
    """Pack through an array of single bits."""
    rows, count = values.shape[0], math.prod(values.shape[1:])
    flat = values.numpy().reshape(rows, count, 1)
    single = (flat >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(single.reshape(rows, count * bits), axis=1, bitorder="little")


@given(BITS, SHAPES, DTYPES, st.integers(0, 2**32))
def test_packing_agrees_with_single_bits_and_inverts(
    bits: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int
) -> None:
    values = draw(shape, bits=bits, seed=seed)
    packed = pack_unsigned(values.to(dtype), bits=bits)
    assert packed.dtype == torch.uint8
    assert tuple(packed.shape) == packed_shape(shape, bits=bits)
    np.testing.assert_array_equal(packed.numpy(), oracle(values, bits=bits))
    restored = unpack_unsigned(packed, bits=bits, shape=shape)
    assert restored.dtype == torch.uint8
    assert torch.equal(restored, values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_extremes_of_the_range_survive(bits: int) -> None:
    values = torch.full((3, 17), 2**bits - 1)
    assert torch.equal(
        unpack_unsigned(pack_unsigned(values, bits=bits), bits=bits, shape=(3, 17)).long(), values
    )


def test_four_bits_put_the_even_element_in_the_low_nibble() -> None:
    assert pack_unsigned(torch.tensor([[0x1, 0x2, 0x3]]), bits=4).tolist() == [[0x21, 0x03]]


def test_values_need_not_be_contiguous() -> None:
    values = draw((6, 5, 4), bits=3, seed=0).permute(2, 0, 1)
    assert torch.equal(unpack_unsigned(pack_unsigned(values, bits=3), bits=3, shape=values.shape), values)


def test_eight_bits_do_not_alias_the_input() -> None:
    values = draw((2, 4), bits=8, seed=0)
    before = values.clone()
    packed = pack_unsigned(values, bits=8)
    unpack_unsigned(packed, bits=8, shape=(2, 4)).zero_()
    packed.zero_()
    assert torch.equal(values, before)


@pytest.mark.parametrize("bits", range(1, 9))
def test_meta_tensors_pack_and_unpack_by_shape(bits: int) -> None:
    packed = pack_unsigned(torch.empty(4, 3, 3, 3, dtype=torch.uint8, device="meta"), bits=bits)
    assert packed.is_meta
    assert tuple(packed.shape) == packed_shape((4, 3, 3, 3), bits=bits)
    assert unpack_unsigned(packed, bits=bits, shape=(4, 3, 3, 3)).shape == (4, 3, 3, 3)


@pytest.mark.parametrize("values", [[[-1, 0]], [[0, 16]]])
def test_values_out_of_range_are_named(values: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"span (-1 to 0|0 to 16); 4 bits hold 0 to 15"):
        pack_unsigned(torch.tensor(values), bits=4)


@pytest.mark.parametrize("bits", [-1, 0, 9])
def test_bits_out_of_range_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        packed_shape((1, 1), bits=bits)


@pytest.mark.parametrize("shape", [(), (2, -1)])
def test_shapes_that_cannot_be_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape is"):
        packed_shape(shape, bits=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_only_integers_pack(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=str(dtype)):
        pack_unsigned(torch.zeros(2, 2, dtype=dtype), bits=4)


def test_packed_of_another_dtype_or_shape_is_refused() -> None:
    with pytest.raises(TypeError, match=r"torch\.int32"):
        unpack_unsigned(torch.zeros(1, 2, dtype=torch.int32), bits=4, shape=(1, 3))
    with pytest.raises(ValueError, match=r"\(1, 3\).*packs to \(1, 2\)"):
        unpack_unsigned(torch.zeros(1, 3, dtype=torch.uint8), bits=4, shape=(1, 3))
