"""The operators as torch sees them: schema, fake kernels, whole-graph compilation; the layouts of weights;
the grid of a token.
"""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels.operators.multiply import convolution_codes, linear_codes, linear_weight_only
from tfmq.kernels.operators.norms import group_norm_codes, layer_norm_codes
from tfmq.kernels.operators.product import product_codes
from tfmq.kernels.operators.quantize import quantize_codes, quantize_tokens
from tfmq.kernels.operators.weights import half_packed, half_unpacked

SEGMENTS = (5, 3)
TABLE = (0.01 + torch.arange(6.0).reshape(3, 2) / 50, torch.arange(100, 106, dtype=torch.uint8).reshape(3, 2))


def grid(count: int = 2) -> tuple[Any, ...]:
    return (*TABLE, torch.arange(count) % 3, list(SEGMENTS))


def weight(*window: int) -> tuple[Any, ...]:
    values = torch.randint(-128, 128, (6, *window, 8)).to(torch.int8)
    sums = torch.stack(
        [part.flatten(1).sum(dim=1) for part in values.int().split(SEGMENTS, dim=-1)], dim=1
    ).to(torch.int32)
    return values, None, torch.rand(6, 2), sums, torch.randn(6)


def nibbles() -> tuple[Any, ...]:
    return (
        half_packed(torch.randint(16, (6, 8)), SEGMENTS),
        torch.full((6, 2), 8, dtype=torch.int8),
        torch.rand(6, 2),
    )


def codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8)


CALLS: dict[Any, Any] = {
    quantize_codes: lambda: (torch.randn(2, 4, 3, 8), *grid(), 256, [1, 0, 2, 1]),
    quantize_tokens: lambda: (torch.randn(2, 4, 8),),
    linear_codes: lambda: (codes(2, 4, 8), *grid(), *weight(), "gelu", torch.randn(2, 4, 6), torch.bfloat16),
    convolution_codes: lambda: (
        codes(2, 6, 5, 8),
        *grid(),
        *weight(3, 2),
        [2, 1],
        [1, 2],
        "",
        None,
        torch.float32,
    ),
    linear_weight_only: lambda: (torch.randn(4, 8), list(SEGMENTS), *nibbles(), torch.randn(6)),
    group_norm_codes: lambda: (
        torch.randn(2, 4, 3, 8),
        2,
        torch.rand(8),
        torch.randn(8),
        1e-5,
        "silu",
        *grid(),
        256,
        [1, 1, 1, 1],
    ),
    layer_norm_codes: lambda: (
        torch.randn(2, 4, 8),
        None,
        None,
        1e-5,
        torch.randn(2, 8),
        torch.randn(2, 8),
        *grid(),
        256,
    ),
    product_codes: lambda: (
        torch.randn(2, 4, 8),
        *(values[:2, 0] for values in TABLE),
        256,
        torch.randn(2, 8, 3),
        *(v[:1, 1] for v in TABLE),
        256,
    ),
}


@pytest.mark.parametrize("operator", CALLS, ids=lambda operator: operator._name)
def test_torch_takes_the_operator(operator: Any) -> None:
    torch.library.opcheck(operator, CALLS[operator](), test_utils=("test_schema", "test_faketensor"))


def test_a_layer_compiles_as_one_graph() -> None:
    """No operator breaks a graph, and none looks at a value: the rows of the table are chosen by a tensor."""

    def layer(x: Tensor, index: Tensor, residual: Tensor) -> Tensor:
        where = (*TABLE, index, list(SEGMENTS))
        images = group_norm_codes(
            x, 2, torch.ones(8), torch.zeros(8), 1e-5, "silu", *where, 256, [1, 1, 1, 1]
        )
        y = convolution_codes(images, *where, *kernel, [1, 1], [1, 1], "", None, x.dtype)
        return linear_codes(quantize_codes(x, *where, 256, []), *where, *plain, "silu", residual, x.dtype) + y

    kernel, plain = weight(3, 3), weight()
    x, residual = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for index in (torch.tensor([0]), torch.tensor([2, 1]), torch.tensor([1, 1])):
        assert torch.equal(compiled(x, index, residual), layer(x, index, residual))


def test_an_unknown_activation_function_is_named() -> None:
    arguments = list(CALLS[linear_codes]())
    arguments[-3] = "relu"
    with pytest.raises(
        ValueError, match="no activation function 'relu'; the epilogue has '', 'silu', 'gelu', 'gelu_tanh'"
    ):
        linear_codes(*arguments)


def test_rows_that_do_not_divide_are_named() -> None:
    with pytest.raises(ValueError, match="3 samples do not divide into 2 rows of a grid"):
        quantize_codes(torch.randn(3, 8), *grid(), 256, [])


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([(), (3,), (2, 2)]),
    st.integers(0, 2**31),
)
def test_half_packing_is_undone(sizes: list[int], window: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randint(16, (3, *window, sum(sizes))).to(torch.uint8)
    for segments in (tuple(sizes), ()):
        packed = half_packed(values, segments)
        assert packed.shape == (3, *window, sum((size + 1) // 2 for size in segments or (sum(sizes),)))
        assert torch.equal(half_unpacked(packed, segments, sum(sizes)), values)


def test_a_byte_holds_channels_half_a_segment_apart() -> None:
    packed = half_packed(torch.arange(10)[None], (6, 4))
    assert [[int(byte) & 15, int(byte) >> 4] for byte in packed[0]] == [
        [0, 3],
        [1, 4],
        [2, 5],
        [6, 8],
        [7, 9],
    ]


def test_dynamic_tokens_multiply_as_floating_point_does() -> None:
    """Each token on its own grid: the product is that of the dequantized values, and those are within half a
    step.
    """
    x, values = torch.randn(5, 8), torch.randint(-127, 128, (6, 8)).to(torch.int8)
    quantized, scale = quantize_tokens(x)
    assert bool(((quantized * scale - x).abs() <= scale * 0.5001).all())
    zero, index = torch.full((5, 1), 128, dtype=torch.uint8), torch.arange(5)
    sums = values.sum(dim=1, dtype=torch.int32)[:, None]
    y = linear_codes(
        quantized, scale, zero, index, [], values, None, torch.ones(6, 1), sums, None, "", None, torch.float32
    )
    torch.testing.assert_close(
        y.double(), (quantized.double() * scale) @ values.double().T, rtol=1e-6, atol=1e-5
    )
