"""Triton's products in its interpreter, against the operators' definitions in exact arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels.operators import multiply as definitions

kernels = pytest.importorskip("tfmq.kernels.gpu.multiply")
tiles = pytest.importorskip("tfmq.kernels.gpu.tiles")

Drawn = Callable[..., Any]
# A failing example is shrunk for minutes in the interpreter, and is small already.
UNSHRUNK = (Phase.explicit, Phase.generate)
# Smaller than the operands, so that there are several in every direction, and blocks that stick out.
TILES = [(16, 16, 32), (16, 32, 16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def tile(size: tuple[int, int, int]) -> Any:
    return tiles.Tile(*size)


def codes_of(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(-128, 128, shape).to(torch.int8)


@settings(max_examples=12, phases=UNSHRUNK)
@given(st.data(), st.booleans(), st.sampled_from(TILES), st.sampled_from(DTYPES))
def test_a_linear_layer_is_exact(
    draw_grid: Drawn, draw_weight: Drawn, data: st.DataObject, nibbles: bool, size: Any, dtype: torch.dtype
) -> None:
    batch, tokens, channels = data.draw(st.sampled_from([(1, 1, 5), (2, 9, 13), (3, 6, 70)]))
    grid = data.draw(draw_grid(channels=channels, batch=batch, rows=batch * tokens))
    weight = data.draw(draw_weight(shape=(19, channels), segments=grid.segments, nibbles=nibbles))
    arguments = (codes_of((batch, tokens, channels)), *grid, *weight, "", None, dtype)
    y, expected = kernels.linear_codes(*arguments, tile=tile(size)), definitions.linear_codes(*arguments)
    # The interpreter, unlike a GPU, cuts off what bfloat16 does not hold.
    torch.testing.assert_close(y, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@settings(max_examples=14, phases=UNSHRUNK)
@given(st.data(), st.booleans(), st.sampled_from(TILES))
def test_a_convolution_is_exact(
    draw_grid: Drawn, draw_weight: Drawn, data: st.DataObject, nibbles: bool, size: Any
) -> None:
    stride, dilation = ([data.draw(st.integers(1, 2)) for _ in range(2)] for _ in range(2))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(2)]
    channels = data.draw(st.sampled_from([5, 34]))
    grid = data.draw(draw_grid(channels=channels, batch=2))
    weight = data.draw(draw_weight(shape=(7, *kernel, channels), segments=grid.segments, nibbles=nibbles))
    arguments = (codes_of((2, 5, 6, channels)), *grid, *weight, stride, dilation, "", None, torch.float32)
    assert torch.equal(
        kernels.convolution_codes(*arguments, tile=tile(size)), definitions.convolution_codes(*arguments)
    )


@settings(max_examples=8, phases=UNSHRUNK)
@given(st.data(), st.sampled_from(["silu", "gelu", "gelu_tanh", ""]), st.booleans())
def test_the_epilogue_is_that_of_torch(
    draw_grid: Drawn, draw_weight: Drawn, data: st.DataObject, activation: str, residual: bool
) -> None:
    grid = data.draw(draw_grid(channels=13, batch=2))
    weight = data.draw(draw_weight(shape=(7, 2, 2, 13), segments=grid.segments, nibbles=False))
    weight = weight._replace(weight_scale=weight.weight_scale * 0.01)
    more = torch.randn(2, 4, 5, 7) if residual else None
    arguments = (codes_of((2, 5, 6, 13)), *grid, *weight, [1, 1], [1, 1], activation, more, torch.float32)
    expected = definitions.convolution_codes(*arguments)
    torch.testing.assert_close(
        kernels.convolution_codes(*arguments, tile=tile(TILES[0])), expected, rtol=2e-5, atol=2e-5
    )


@settings(max_examples=10, phases=UNSHRUNK)
@given(st.data(), st.booleans(), st.sampled_from([torch.float32, torch.float16]), st.sampled_from([1, 18]))
def test_weight_only_rounds_as_float_products_do(
    draw_weight: Drawn, data: st.DataObject, nibbles: bool, dtype: torch.dtype, rows: int
) -> None:
    # The interpreter multiplies the bit patterns of bfloat16: only a GPU can say what becomes of those.
    segments = data.draw(st.sampled_from([(), (6, 7), (1, 8, 4)]))
    weight = data.draw(draw_weight(shape=(19, 13), segments=segments, nibbles=nibbles))
    x = torch.randn(rows, 13).to(dtype)
    arguments = (x, segments, weight.weight, weight.weight_zero, weight.weight_scale, weight.bias)
    y, expected = (
        kernels.linear_weight_only(*arguments, tile=tile(TILES[0])),
        definitions.linear_weight_only(*arguments),
    )
    magnitude = float(expected.float().abs().max())
    torch.testing.assert_close(y, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * magnitude)


def test_long_sums_stay_exact() -> None:
    """Sums beyond 2**24, which float32 would round, and near the end of int32."""
    channels = 2**12
    codes, weight = (
        torch.full((1, channels), 127, dtype=torch.int8),
        torch.full((3, channels), 127, dtype=torch.int8),
    )
    weight[1] = -128
    weight[2, ::2] = -1
    sums = weight.sum(dim=1, dtype=torch.int32)[:, None]
    grid = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ())
    arguments = (codes, *grid, weight, None, torch.ones(3, 1), sums, None, "", None, torch.float64)
    y = kernels.linear_codes(*arguments, tile=tiles.Tile(16, 16, 256))
    assert y.tolist() == [[float((255 * weight.long()).sum(dim=1)[row]) for row in range(3)]]


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_no_rows_are_no_launch(shape: tuple[int, ...]) -> None:
    grid = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ())
    weight = (
        torch.ones(4, 5, dtype=torch.int8),
        None,
        torch.ones(4, 1),
        torch.full((4, 1), 5, dtype=torch.int32),
        None,
    )
    assert kernels.linear_codes(
        torch.zeros(shape, dtype=torch.int8), *grid, *weight, "", None, torch.float32
    ).shape == (*shape[:-1], 4)
