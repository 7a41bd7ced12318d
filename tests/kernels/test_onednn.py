"""oneDNN's integer layers against the reference."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.kernels import onednn_products
from tfmq.kernels.halves import halves, saturates
from tfmq.kernels.kernel import ACCUMULATOR, IntegerWeight, Rows, channels, column
from tfmq.kernels.onednn import (
    OnednnKernel,
    UnpackingKernel,
    available,
    constants,
    multipliable,
    quantize_u8,
    supports,
)
from tfmq.kernels.onednn_products import product
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.numerics.affine import quantize
from tfmq.numerics.operations import Convolution, Linear

pytestmark = pytest.mark.skipif(not available(), reason="this torch has no integer operators of oneDNN")

Cases = Callable[..., Any]
TIE = 2.0**-15
UNIT = 2.0**-24
CPUINFO = Path("/proc/cpuinfo")
TILES = CPUINFO.exists() and "amx_int8" in CPUINFO.read_text()


def clear_of_ties(shape: tuple[int, ...]) -> Tensor:
    return (torch.rand(shape) - 0.5) * 0.98


def near_ties(shape: tuple[int, ...]) -> Tensor:
    """Offsets of which most are so near a half that float32 decides."""
    return 0.5 + torch.randint(-4, 5, shape) * 2.0**-17


def distance_to_tie(x: Tensor, scale: Tensor) -> Tensor:
    scaled = x.double() * scale.reciprocal().double()
    return (scaled - scaled.floor() - 0.5).abs()


def agree(y: Tensor, exact: Tensor, weight: IntegerWeight, x: Tensor, rows: Rows) -> bool:
    """Whether every bit is the same; on AMX tiles for convolutions, and without VNNI for all, where both
    scales are applied at once, whether the same sums were rounded otherwise.
    """
    if not saturates() and (not TILES or isinstance(weight.operation, Linear)):
        return torch.equal(y, exact)
    magnitude = torch.zeros_like(exact)
    columns = zip(
        weight.split(x), rows.scale.unbind(-1), rows.zero_point.unbind(-1), weight.parts(), strict=True
    )
    for part, scale, zero_point, (values, weight_scale) in columns:
        s, z = column(scale, x.ndim), column(zero_point, x.ndim).float()
        terms = weight.operation(
            (quantize(part.float(), s, z, rows.levels) - z).abs(), values.abs().float(), None
        )
        magnitude += terms * s * channels(weight_scale, weight.operation, x.ndim)
    if weight.bias is not None:
        magnitude += channels(weight.bias.abs(), weight.operation, x.ndim)
    return bool(((y - exact).abs() <= 2 * (rows.scale.shape[-1] + 3) * UNIT * 1.001 * magnitude).all())


@given(st.data())
def test_clear_of_ties_every_bit_is_the_references(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=clear_of_ties, narrow=True))
    assert supports(weight, rows.levels)
    y, exact = OnednnKernel(weight)(x, rows), ReferenceKernel(weight, rows.levels)(x, rows)
    assert y.dtype == exact.dtype and agree(y, exact, weight, x, rows)
    assert (
        y.ndim != 4
        or isinstance(weight.operation, Linear)
        or y.is_contiguous(memory_format=torch.channels_last)
    )


@given(st.data())
def test_a_weight_in_halves_gives_the_same_sums(layer_cases: Cases, data: st.DataObject) -> None:
    """As where the processor cuts sums off, on one grid and on several."""
    weight, x, rows = data.draw(layer_cases(offset=torch.zeros, narrow=True))
    exact = ReferenceKernel(weight, rows.levels)(x, rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tfmq.kernels.onednn_segment.terms", halves)
        y = OnednnKernel(weight)(x, rows)
    assert y.shape == exact.shape and bool(((y - exact).abs() <= 1e-5 * exact.abs().max() + 1e-6).all())


def test_extreme_sums_are_exact() -> None:
    """All codes and weights at their largest: sums of pairs leave int16, which some processors cut off."""
    for sign, shape in ((127, (48, 64)), (-128, (48, 64)), (127, (16, 8, 3, 3)), (-128, (16, 8, 3, 3))):
        values = torch.full(shape, sign, dtype=torch.int16)
        operation = Linear() if len(shape) == 2 else Convolution((1, 1), (0, 0), (1, 1), 1)
        weight = IntegerWeight(operation, values, torch.ones(shape[0], 1), None)
        rows = Rows(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 256)
        x = torch.full((2, *((64,) if len(shape) == 2 else (8, 5, 5))), 255.0)
        y = OnednnKernel(weight)(x, rows)
        assert bool((y == 255.0 * sign * math.prod(shape[1:])).all())


@given(st.data())
def test_on_the_grid_every_bit_is_the_references(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=torch.zeros, narrow=True))
    assert agree(
        OnednnKernel(weight)(x, rows), ReferenceKernel(weight, rows.levels)(x, rows), weight, x, rows
    )


@pytest.mark.parametrize("width", [1, 2, 3])
@pytest.mark.parametrize("stride", [(1, 2), (2, 2), (2, 3)])
@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_of_one_column_are_the_references(stride: tuple[int, int], width: int, mixed: bool) -> None:
    """The library (torch 2.13, on AMX tiles) adds up wrong rows there."""
    values = torch.randint(-7, 8, (6, 4, 3, 3)).to(torch.int16)
    weight = IntegerWeight(Convolution(stride, (1, 1), (1, 1), 1), values, torch.rand(6, 1) + 0.1, None)
    grids = 2 if mixed else 1
    rows = Rows(torch.rand(grids, 1) + 0.1, torch.randint(200, (grids, 1)).to(torch.uint8), 256)
    scale, zero_point = (column(grid[:, 0], 4).float() for grid in (rows.scale, rows.zero_point))
    x = (torch.randint(256, (2, 4, 12, width)) - zero_point) * scale
    y = OnednnKernel(weight)(x, rows)
    assert agree(y, ReferenceKernel(weight, 256)(x, rows), weight, x, rows) and y.is_contiguous(
        memory_format=torch.channels_last
    )


@given(st.data())
def test_near_ties_an_output_moves_by_the_codes_that_may_differ(
    layer_cases: Cases, data: st.DataObject
) -> None:
    weight, x, rows = data.draw(layer_cases(offset=near_ties, narrow=True))
    y, exact = OnednnKernel(weight)(x, rows), ReferenceKernel(weight, rows.levels)(x, rows)
    slack = torch.zeros_like(exact)
    for part, scale, (values, weight_scale) in zip(
        weight.split(x), rows.scale.unbind(-1), weight.parts(), strict=True
    ):
        undecided = (distance_to_tie(part, column(scale, x.ndim)) <= TIE).float()
        moved = weight.operation(undecided, values.abs().float(), None)
        slack += moved * column(scale, x.ndim) * channels(weight_scale, weight.operation, x.ndim)
    assert bool(((y - exact).abs() <= slack * 1.001 + exact.abs() * 1e-6 + 1e-6).all())


@given(st.data())
def test_mixed_rows_are_each_sample_alone(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=clear_of_ties, narrow=True))
    kernel = OnednnKernel(weight)
    together = kernel(x, rows)
    for sample in range(len(x)):
        row = sample % len(rows.scale)
        alone = Rows(rows.scale[row : row + 1], rows.zero_point[row : row + 1], rows.levels)
        own = x[sample : sample + 1]
        assert agree(together[sample : sample + 1], kernel(own, alone), weight, own, alone)


@given(st.data(), st.booleans())
def test_a_zero_point_that_all_rows_share_is_a_constant_that_changes_nothing(
    layer_cases: Cases, data: st.DataObject, static: bool
) -> None:
    weight, x, drawn = data.draw(layer_cases(offset=clear_of_ties, narrow=True))
    assume(drawn.scale.ndim == 2)
    scale = drawn.scale[:1] if static else drawn.scale
    rows = Rows(scale, drawn.zero_point[:1].expand_as(scale), drawn.levels)
    kernel = OnednnKernel(weight, rows.zero_point)
    assert kernel.constants == rows.zero_point[0].tolist()
    assert agree(kernel(x, rows), ReferenceKernel(weight, rows.levels)(x, rows), weight, x, rows)
    assert torch.equal(UnpackingKernel(lambda: weight, rows.zero_point)(x, rows), kernel(x, rows))


def test_only_what_never_varies_is_a_constant() -> None:
    assert constants(None, 2) == [None, None]
    assert constants(torch.tensor([[3, 7, 9], [3, 8, 9]], dtype=torch.uint8), 3) == [3, None, 9]


def test_with_a_constant_zero_point_a_compiled_layer_has_no_term_in_it() -> None:
    weight = IntegerWeight(
        Convolution((1, 1), (1, 1), (1, 1), 1),
        torch.randint(-9, 9, (3, 4, 3, 3)).to(torch.int16),
        torch.ones(3, 1),
        None,
    )
    table, index = torch.rand(5, 1), torch.tensor([1, 3])

    def operators(zero_points: Tensor) -> list[str]:
        kernel = OnednnKernel(weight, zero_points)

        class Layer(torch.nn.Module):
            """A layer as a backend's compiler sees it."""

            def forward(self, x: Tensor) -> Tensor:
                return kernel(x, Rows(table, zero_points, 256, index))

        x = torch.rand(2, 4, 6, 6)
        # A backend calls a model before it captures it.
        Layer()(x)
        graph = torch.export.export(Layer(), (x,)).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    varying, constant = (
        operators(torch.tensor([[3], [3], [4], [3], [3]], dtype=torch.uint8)),
        operators(torch.full((5, 1), 3, dtype=torch.uint8)),
    )
    assert "aten.pad.default" in varying and "aten.sub.Tensor" in varying
    assert not {"aten.pad.default", "aten.sub.Tensor"} & set(constant) and varying.count(
        "aten.index.Tensor"
    ) > constant.count("aten.index.Tensor")


def test_a_convolution_is_packed_for_the_sizes_it_is_called_with() -> None:
    weight = IntegerWeight(
        Convolution((1, 1), (1, 1), (1, 1), 1),
        torch.randint(-9, 9, (96, 96, 3, 3)).to(torch.int16),
        torch.ones(96, 1),
        None,
    )
    rows, unpacked = Rows(torch.full((1, 1), 0.02), torch.full((1, 1), 9, dtype=torch.uint8), 256), []

    def again() -> IntegerWeight:
        unpacked.append(1)
        return weight

    kernel = OnednnKernel(weight, again=again)
    for size in (4, 8, 16, 8, 16, 4):
        x = torch.rand(2, 96, size, size)
        assert torch.equal(kernel(x, rows), ReferenceKernel(weight, 256)(x, rows))
    assert len(kernel.packed) == 2 and len(unpacked) == 4, "two sizes are kept, the last used ones"


@given(st.data())
def test_unpacking_at_each_call_and_copies_change_nothing(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=near_ties, narrow=True))
    kernel = OnednnKernel(weight)
    y = kernel(x, rows)
    for other in (UnpackingKernel(lambda: weight), copy.deepcopy(kernel)):
        assert torch.equal(other(x, rows), y)


@given(st.data(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_the_output_has_the_dtype_of_the_input(
    layer_cases: Cases, data: st.DataObject, dtype: torch.dtype
) -> None:
    weight, x, rows = data.draw(layer_cases(offset=clear_of_ties, narrow=True))
    kernel = OnednnKernel(weight)
    assert torch.equal(kernel(x.to(dtype), rows), kernel(x.to(dtype).float(), rows).to(dtype))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "empty", "channels_last"])
def test_any_layout_of_the_input(layout: str) -> None:
    weight = IntegerWeight(
        Convolution((1, 1), (1, 1), (1, 1), 1),
        torch.randint(-128, 128, (6, 4, 3, 3)).to(torch.int16),
        torch.rand(6, 1),
        None,
    )
    rows = Rows(torch.full((1, 1), 0.03), torch.full((1, 1), 117, dtype=torch.uint8), 256)
    x = {
        "transposed": torch.randn(2, 6, 6, 4).permute(0, 3, 2, 1),
        "strided": torch.randn(2, 8, 6, 6)[:, ::2],
        "expanded": torch.randn(1, 4, 6, 6).expand(3, 4, 6, 6),
        "empty": torch.randn(0, 4, 6, 6),
        "channels_last": torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last),
    }[layout]
    assert agree(OnednnKernel(weight)(x, rows), ReferenceKernel(weight, 256)(x, rows), weight, x, rows)


@given(
    st.floats(2.0**-13, 128.0, width=32),
    st.integers(2, 8),
    st.data(),
    st.integers(0, 2**31),
    st.sampled_from([1, 7, 64, 333]),
)
def test_codes_differ_by_one_and_only_at_ties(
    scale: float, bits: int, data: st.DataObject, seed: int, count: int
) -> None:
    torch.manual_seed(seed)
    levels, wide = 2**bits, torch.tensor(scale)
    zero_point = data.draw(st.integers(0, levels - 1))
    x = (torch.randint(-300, 300, (count,)) + near_ties((count,))) * wide
    x[0] = data.draw(st.sampled_from([0.0, math.inf, -math.inf, 3e38, -3e38]))
    codes = quantize_u8(x, scale, zero_point, levels)
    difference = (codes.float() - quantize(x, wide, torch.tensor(float(zero_point)), levels)).abs()
    assert codes.dtype == torch.uint8 and float(difference.max()) <= 1
    assert bool((distance_to_tie(x, wide)[difference > 0] <= TIE).all())


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("length", [4096, ACCUMULATOR // (128 * 255)])
def test_long_sums_round_as_the_formula_says(length: int, rows: int) -> None:
    values = torch.full((1, length), -128, dtype=torch.int16)
    values[:, ::2] += torch.randint(0, 20, values[:, ::2].shape).to(torch.int16)
    weight = IntegerWeight(Linear(), values, torch.tensor([[0.013]]), torch.tensor([3.0]))
    grid = Rows(torch.full((rows, 1), 0.1), torch.full((rows, 1), 3, dtype=torch.uint8), 256)
    x = 18.0 + torch.randint(60, (2, length)) * 0.1
    assert supports(weight, 256)
    y, exact = OnednnKernel(weight)(x, grid), ReferenceKernel(weight, 256)(x, grid)
    largest = length * 128 * 255 * 0.1 * 0.013
    assert float((y - exact).abs().max()) <= 4 * 2.0**-24 * largest


def test_what_the_library_cannot_compute_exactly_is_not_supported() -> None:
    def weight(
        shape: tuple[int, ...], operation: Any = None, low: int = -8, high: int = 7, **more: Any
    ) -> IntegerWeight:
        values = torch.randint(low, high + 1, shape).to(torch.int16)
        values.view(-1)[:2] = torch.tensor([low, high])
        return IntegerWeight(operation or Linear(), values, torch.ones(shape[0], 1), None, **more)

    plain = Convolution((1, 1), (1, 1), (1, 1), 1)
    assert supports(weight((3, 4)), 256) and supports(weight((3, 4, 3, 3), plain), 256)
    assert supports(weight((3, 4), low=-128, high=127), 256)
    assert not supports(weight((3, 4), low=-129), 256) and not supports(weight((3, 4), high=128), 256)
    assert not supports(weight((3, 4)), 512)
    assert supports(weight((3, 4, 3, 3), Convolution((1, 1), "same", (1, 1), 1)), 256)
    assert not supports(weight((3, 4, 3, 3, 3), Convolution((1,) * 3, (1,) * 3, (1,) * 3, 1)), 256)
    assert not supports(weight((4, 2, 3, 3), Convolution((1, 1), (1, 1), (1, 1), 2), segments=(1, 1)), 256)
    assert supports(weight((3, 4, 3, 1), plain), 256)
    assert not supports(weight((1, 2**18), low=-128, high=-128), 256)


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
    expected = reference_product(left, grids[0], right, grids[1])
    y = product(left, grids[0], right, grids[1])
    assert y.dtype == dtype and torch.equal(y, expected)
    with pytest.MonkeyPatch.context() as patch:
        # As in a captured graph, where large products of integers are unrolled.
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        patch.setattr(onednn_products, "LARGE", 1)
        assert torch.equal(product(left, grids[0], right, grids[1]), expected)


def test_what_may_be_multiplied_stays_in_int32_and_eight_bits() -> None:
    narrow, wide = (
        Rows(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), levels) for levels in (256, 257)
    )
    longest = (2**31 - 1) // (255 * 128)
    assert (
        multipliable(longest, narrow, narrow)
        and not multipliable(longest + 1, narrow, narrow)
        and not multipliable(1, narrow, wide)
    )
