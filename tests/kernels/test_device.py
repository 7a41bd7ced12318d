"""Layers through the operators, here by their definitions, against the exact reference."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tfmq.kernels.device import (
    Geometry,
    OperatorKernel,
    WeightOnlyKernel,
    fits_nibbles,
    operator_product,
    refusal,
)
from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.numerics.operations import Convolution, Linear

Cases = Callable[..., Any]


def anywhere(shape: tuple[int, ...]) -> Tensor:
    """Offsets of which many are ties."""
    return torch.randint(-4, 5, shape) / 8


@given(st.data())
def test_every_bit_is_the_references(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=anywhere))
    if reason := refusal(weight, rows.levels):
        assert (
            weight.values.ndim == 5
            or weight.operation.groups > 1
            or not weight.narrow
            or "transposed" in reason
        )
        return
    exact = ReferenceKernel(weight, rows.levels)(x, rows)
    for nibbles in {False, fits_nibbles(weight)}:
        y = OperatorKernel(weight, nibbles=nibbles)(x, rows)
        assert y.dtype == exact.dtype and torch.equal(y, exact)
        assert (
            y.ndim != 4
            or isinstance(weight.operation, Linear)
            or y.is_contiguous(memory_format=torch.channels_last)
        )


@given(st.data(), st.sampled_from([torch.float16, torch.bfloat16]))
def test_the_output_has_the_dtype_of_the_input(
    layer_cases: Cases, data: st.DataObject, dtype: torch.dtype
) -> None:
    weight, x, rows = data.draw(layer_cases(offset=anywhere, narrow=True))
    if not refusal(weight, rows.levels):
        assert torch.equal(
            OperatorKernel(weight)(x.to(dtype), rows), ReferenceKernel(weight, rows.levels)(x.to(dtype), rows)
        )


@given(st.data())
def test_rows_are_looked_up_in_the_table(layer_cases: Cases, data: st.DataObject) -> None:
    """A table of more rows and the number of each sample's give what those rows alone give."""
    weight, x, rows = data.draw(layer_cases(offset=anywhere, narrow=True))
    if refusal(weight, rows.levels) or rows.scale.ndim != 2:
        # Tokens with a grid each have no table.
        return
    order = torch.randperm(len(rows.scale) + 2)
    index = torch.arange(len(order))[order.argsort()][: len(rows.scale)]
    tables = [
        torch.cat([values, values.flip(0).repeat(2, 1)[:2]])[order]
        for values in (rows.scale, rows.zero_point)
    ]
    kernel = OperatorKernel(weight)
    assert torch.equal(kernel(x, Rows(*tables, rows.levels, index)), kernel(x, rows))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid", (2, 1)])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 4), (1, 1)])
def test_named_padding(padding: Any, kernel: tuple[int, int]) -> None:
    weight = IntegerWeight(
        Convolution((1, 1), padding, (2, 1), 1),
        torch.randint(-7, 8, (5, 4, *kernel)).to(torch.int16),
        torch.rand(5, 1),
        None,
    )
    rows = Rows(torch.full((1, 1), 0.03), torch.full((1, 1), 117, dtype=torch.uint8), 256)
    x = torch.randn(2, 4, 9, 8)
    assert torch.equal(OperatorKernel(weight)(x, rows), ReferenceKernel(weight, 256)(x, rows))


def test_one_axis_is_the_second_of_two() -> None:
    geometry = Geometry.of(Convolution((2,), (1,), (3,), 1).window((3,)))
    assert geometry == Geometry(stride=(1, 2), dilation=(1, 3), padding=(0, 1, 0, 1))


@given(st.data())
def test_weight_only_layers_are_float_products(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, _ = data.draw(layer_cases(offset=anywhere, narrow=True))
    if not isinstance(weight.operation, Linear):
        return
    wide = torch.cat([values.double() * scale[:, None] for values, scale in weight.parts()], dim=1)
    expected = x.double() @ wide.T + (0 if weight.bias is None else weight.bias)
    for nibbles in {False, fits_nibbles(weight)}:
        y = WeightOnlyKernel(weight, nibbles=nibbles)(x, None)
        torch.testing.assert_close(
            y.double(), expected, rtol=1e-5, atol=1e-5 * float(wide.abs().max() * x.abs().max() + 1)
        )


def test_nibbles_take_half_of_the_memory() -> None:
    weight = IntegerWeight(Linear(), torch.randint(-15, 1, (8, 64)).to(torch.int16), torch.rand(8, 1), None)
    assert OperatorKernel(weight, nibbles=True).weight.nbytes * 2 == OperatorKernel(weight).weight.nbytes


def test_a_kernel_moves_and_copies_with_its_model_and_is_no_part_of_the_state() -> None:
    weight = IntegerWeight(
        Linear(), torch.randint(-128, 128, (3, 4)).to(torch.int16), torch.rand(3, 1), torch.randn(3)
    )
    model = nn.Sequential(OperatorKernel(weight))
    assert not model.state_dict()
    assert {buffer.device.type for buffer in copy.deepcopy(model).to("meta").buffers()} == {"meta"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}


@given(
    st.integers(0, 2**31),
    st.sampled_from([(2,), (2, 3), ()]),
    st.booleans(),
    st.integers(2, 8),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_product_is_the_references(
    seed: int, batch: tuple[int, ...], mixed: bool, bits: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(4, *batch, 5, 7, dtype=dtype), torch.randn(4, *batch, 7, 3, dtype=dtype)
    rows = 4 if mixed else 1
    grids = [
        Rows(0.01 + torch.rand(rows, 1), torch.randint(2**bits, (rows, 1)).to(torch.uint8), 2**bits)
        for _ in range(2)
    ]
    y = operator_product(left, grids[0], right, grids[1])
    assert y.dtype == dtype and torch.equal(y, reference_product(left, grids[0], right, grids[1]))
