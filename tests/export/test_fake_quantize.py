"""The layer that engines fuse equals the layer's own formula, whatever the zero-points of the timesteps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tfmq.export.fake_quantize import FakeQuantizeKernel, product_kernels
from tfmq.export.quiet import quiet_tools
from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.nn.operation import operation_of, weight_of
from tfmq.nn.products import ProductQuantizers
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.steps import StepContext


@st.composite
def cases(draw: st.DrawFn) -> tuple[IntegerWeight, torch.Tensor, Rows]:
    """A layer with integers of four or eight bits, an input on or off the grid, and a row for each sample or
    for all.
    """
    torch.manual_seed(draw(st.integers(0, 2**31)))
    segments, outputs = draw(st.sampled_from([(), (2, 4)])), 4
    if draw(st.booleans()):
        source: nn.Module = nn.Linear(6, outputs, bias=draw(st.booleans()))
        x = torch.randn(3, 4, 6)
    else:
        options = {
            "stride": draw(st.integers(1, 2)),
            "padding": draw(st.integers(0, 2)),
            "dilation": draw(st.integers(1, 2)),
        }
        kind, size = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d])), draw(st.integers(1, 3))
        groups = draw(st.sampled_from([1, 2])) if kind is nn.ConvTranspose2d and not segments else 1
        source = kind(6, outputs, size, groups=groups, bias=draw(st.booleans()), **options)
        x = torch.randn(3, 6, 7, 8)
    low, high = draw(st.sampled_from([(-15, 15), (-128, 127)]))
    columns, batch = max(1, len(segments)), draw(st.sampled_from([1, 3]))
    operation = operation_of(source)
    assert operation is not None
    values = torch.randint(low, high + 1, weight_of(source).shape, dtype=torch.int16)
    bias = None if source.bias is None else source.bias.detach()
    weight = IntegerWeight(operation, values, torch.rand(outputs, columns) * 0.05 + 0.01, bias, segments)
    rows = Rows(
        torch.rand(batch, columns) * 0.02 + 0.01,
        torch.randint(0, 256, (batch, columns), dtype=torch.uint8),
        draw(st.sampled_from([16, 256])),
    )
    return weight, x, rows


@given(cases(), st.sampled_from([None, True]), st.booleans())
def test_it_computes_the_formula_of_the_layer(
    case: tuple[IntegerWeight, torch.Tensor, Rows], middle: bool | None, halved: bool
) -> None:
    weight, x, rows = case
    exact = ReferenceKernel(weight, rows.levels)(x, rows)
    kernel = FakeQuantizeKernel(
        weight, rows.zero_point, middle=middle and rows.levels // 2, halved=halved and weight.narrow
    )
    through = kernel(x, rows)
    # The quotient is shifted before it is rounded, so a value within rounding error of a tie may fall on the
    # other side: one code of one input.
    step = (rows.scale.max() * weight.scale.max() * weight.values.abs().max()).item()
    difference = (exact - through).abs()
    assert difference.max() <= step * 1.001 + 1e-3
    assert (difference > 1e-3).float().mean() < 0.2


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_traced_graph_computes_nothing_of_the_tables() -> None:
    """They are constants in it, in the shape in which they are read."""
    operation = operation_of(nn.Conv2d(6, 4, 3))
    assert operation is not None
    values = torch.randint(-7, 8, (4, 6, 3, 3)).short()
    weight = IntegerWeight(operation, values, torch.rand(4, 1), torch.rand(4))
    steps = StepContext(torch.arange(5.0))
    quantizer = ActivationQuantizer(IntegerFormat(8), steps=steps)
    quantizer.fit(torch.rand(5, 1) * 0.02 + 0.01, torch.randint(100, 140, (5, 1)).float())
    x, bins = torch.randn(2, 6, 7, 8), torch.tensor([1, 3])

    def kinds(kernel: FakeQuantizeKernel) -> list[str]:
        def called(x: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
            with steps.at_bins(bins):
                return kernel(x, quantizer.rows(x))

        expected = called(x, bins)
        with quiet_tools():
            traced = torch.jit.trace(called, (x, bins), check_trace=False)
        torch._C._jit_pass_dce(traced.graph)
        assert torch.equal(traced(x, bins), expected)
        return [node.kind() for node in traced.inlined_graph.nodes()]

    fixed, any_scales = (
        kinds(FakeQuantizeKernel(weight, quantizer.zero_points(), scales=scales))
        for scales in (quantizer.scale, None)
    )
    made = {"aten::reciprocal", "aten::select", "aten::unsqueeze"}
    assert made <= {*any_scales} and not made & {*fixed}
    assert not {"aten::to", "aten::size"} & {*fixed} and fixed.count("aten::index") == 3


@given(st.integers(0, 2**31), st.sampled_from([(), (2, 4)]), st.integers(4, 8), st.booleans())
def test_tokens_with_grids_of_their_own(
    seed: int, segments: tuple[int, ...], bits: int, symmetric: bool
) -> None:
    torch.manual_seed(seed)
    operation = operation_of(nn.Linear(6, 5))
    assert operation is not None
    weight = IntegerWeight(
        operation,
        torch.randint(-127, 128, (5, 6)).to(torch.int16),
        torch.rand(5, max(1, len(segments))),
        torch.randn(5),
        segments,
    )
    quantizer, x = (
        DynamicQuantizer(IntegerFormat(bits, symmetric), segments=segments),
        torch.randn(3, 4, 6) * torch.tensor([1.0, 100, 1, 5])[:, None],
    )
    rows = quantizer.rows(x)
    exact, through = (
        ReferenceKernel(weight, rows.levels)(x, rows),
        FakeQuantizeKernel(weight, quantizer.zero_points())(x, rows),
    )
    step = rows.scale.amax(dim=-1, keepdim=True) * weight.scale.max() * 127
    assert bool(((exact - through).abs() <= step * 1.001 + 1e-3).all())
    assert ((exact - through).abs() > 1e-3 * step).float().mean() < 0.2


def test_rows_that_share_a_zero_point_need_no_correction() -> None:
    operation = operation_of(nn.Linear(4, 3))
    assert operation is not None
    weight = IntegerWeight(operation, torch.ones(3, 4, dtype=torch.int16), torch.ones(3, 1), None)
    assert FakeQuantizeKernel(weight, torch.full((5, 1), 7)).shifts == [False]
    assert FakeQuantizeKernel(weight, torch.tensor([[7], [8]])).shifts == [True]
    for zeros, centre in ((0, 0), (128, 128), (7, 128)):
        kernel = FakeQuantizeKernel(weight, torch.full((5, 1), zeros), middle=128)
        assert kernel.centres == [centre] and kernel.shifts == [zeros != centre]


def product_quantizers(
    left: list[int], right: list[int], *, bits: int = 8, symmetric: bool = False
) -> ProductQuantizers:
    """One product with these zero-points at two timesteps."""
    quantizers = []
    for zeros in (left, right):
        quantizer = ActivationQuantizer(
            IntegerFormat(bits, symmetric), steps=StepContext(torch.tensor([1.0, 2.0]))
        )
        quantizer.fit(torch.tensor([[0.02], [0.03]]), torch.tensor(zeros, dtype=torch.uint8)[:, None])
        quantizers.append(quantizer)
    return ProductQuantizers(quantizers[:1], quantizers[1:])


@pytest.mark.parametrize(
    ("left", "right", "integer"),
    [
        ([0, 0], [128, 128], True),
        ([128, 128], [128, 128], True),
        ([0, 128], [128, 128], False),
        ([7, 7], [128, 128], False),
        ([0, 0], [0, 0], False),
    ],
)
def test_products_with_the_zero_points_of_integer_products(
    left: list[int], right: list[int], integer: bool
) -> None:
    kernels = product_kernels(product_quantizers(left, right), halved=False)
    assert product_kernels(product_quantizers(left, right), halved=True) == {}
    assert set(kernels) == ({0} if integer else set())
    if integer:
        x, y = torch.randn(2, 3, 5, 7), torch.randn(2, 3, 7, 4)
        rows = [
            Rows(torch.tensor([[0.02], [0.03]]), torch.tensor(zeros, dtype=torch.uint8)[:, None], 256)
            for zeros in (left, right)
        ]
        torch.testing.assert_close(
            kernels[0](x, rows[0], y, rows[1]), reference_product(x, rows[0], y, rows[1])
        )


def test_products_in_full_precision_have_no_kernel() -> None:
    assert product_kernels(ProductQuantizers([None], [None])) == {}


def test_weights_alone() -> None:
    operation = operation_of(nn.Linear(4, 3))
    assert operation is not None
    weight = IntegerWeight(
        operation, torch.randint(-8, 8, (3, 4), dtype=torch.int16), torch.rand(3, 1), torch.randn(3)
    )
    x = torch.randn(2, 4)
    assert weight.bias is not None
    torch.testing.assert_close(
        FakeQuantizeKernel(weight, None)(x, None), x @ (weight.values * weight.scale).T + weight.bias
    )


@pytest.mark.parametrize("levels", [16, 256])
def test_the_quantizer_of_a_graph_saturates(levels: int) -> None:
    codes = torch.ops.tfmq.codes(torch.tensor([-1e4, -0.5, 0.5, 1.5, 1e4]), 3, levels)
    assert codes.tolist() == [-3.0, 0.0, 0.0, 2.0, float(levels - 4)]
