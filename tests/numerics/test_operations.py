"""Operations against torch's own functions: what a window reads, and where."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics.operations import Convolution, Linear, Operation, TransposedConvolution
from tfmq.numerics.window import Window


class Case(NamedTuple):
    """An operation over one to three axes, its kernel, and the seed of its tensors."""

    operation: Operation
    kernel: tuple[int, ...]
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return an input, the weight in rows, and the bias, all float64."""
        torch.manual_seed(self.seed)
        x = torch.randn(2, 4, *(4 + axis for axis in range(len(self.kernel))), dtype=torch.float64)
        return (
            x,
            torch.randn(6, 4 // self.operation.groups, *self.kernel, dtype=torch.float64),
            torch.randn(6, dtype=torch.float64),
        )


@st.composite
def transposed(draw: st.DrawFn) -> Case:
    axes = draw(st.integers(1, 3))

    def amounts(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    kernel, dilation, stride = amounts(1, 3), amounts(1, 3), amounts(1, 3)
    more = tuple(
        draw(st.integers(0, max(step, apart) - 1)) for step, apart in zip(stride, dilation, strict=True)
    )
    # At most what leaves one place of an input of four.
    most = [
        (3 * step + apart * (taps - 1) + extra) // 2
        for step, apart, taps, extra in zip(stride, dilation, kernel, more, strict=True)
    ]
    padding = tuple(draw(st.integers(0, min(3, cut))) for cut in most)
    operation = TransposedConvolution(stride, padding, more, dilation, draw(st.sampled_from([1, 2])))
    return Case(operation, kernel, draw(st.integers(0, 2**31)))


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    kernel, dilation = (tuple(draw(st.integers(1, 3)) for _ in range(axes)) for _ in range(2))
    # An input of four has to hold the window.
    kernel = tuple(min(taps, 2) if apart == 3 else taps for taps, apart in zip(kernel, dilation, strict=True))
    dilation = tuple(1 if taps == 3 else apart for taps, apart in zip(kernel, dilation, strict=True))
    padding: Any = draw(
        st.sampled_from(["same", "valid", *[tuple(draw(st.integers(0, 3)) for _ in range(axes))] * 3])
    )
    stride = tuple(1 if padding == "same" else draw(st.integers(1, 3)) for _ in range(axes))
    return Case(Convolution(stride, padding, dilation, groups), kernel, draw(st.integers(0, 2**31)))


cases = st.one_of(convolutions(), transposed())
# Of even kernels torch says that it copies the input.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")


@given(transposed())
def test_transposed_convolutions_are_torchs_own_on_rows_of_its_weight(case: Case) -> None:
    operation: Any = case.operation
    x, rows, bias = case.tensors()
    weight = operation.stored(rows)
    assert weight.shape[:2] == (4, 6 // operation.groups) and torch.equal(operation.rows(weight), rows)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(case.kernel) - 1]
    sizes = (
        operation.stride,
        operation.padding,
        operation.output_padding,
        operation.groups,
        operation.dilation,
    )
    assert torch.equal(operation(x, rows, bias), function(x, weight, bias, *sizes))
    # A row makes an output channel of its own, and no other.
    alone = torch.zeros_like(rows)
    alone[4] = rows[4]
    made = operation(x, alone, None)
    torch.testing.assert_close(made[:, 4] + bias[4], operation(x, rows, bias)[:, 4])
    assert not made[:, [0, 1, 2, 3, 5]].any()


@given(cases)
def test_the_inputs_of_an_output_times_the_weight_are_the_output(case: Case) -> None:
    operation, (x, weight, bias) = case.operation, case.tensors()
    output = operation(x, weight, bias)
    places = torch.randperm(operation.places(output))[:9]
    read = operation.inputs_at(x, case.kernel, places)
    product = read @ weight.flatten(1).unflatten(0, (operation.groups, -1)).mT
    torch.testing.assert_close(
        product.transpose(0, 1).flatten(1) + bias, operation.outputs_at(output, places)
    )


@given(cases, st.sampled_from([0.0, 3.0]))
def test_laid_out_an_input_is_read_as_by_an_ordinary_convolution(case: Case, fill: float) -> None:
    operation, (x, weight, bias) = case.operation, case.tensors()
    window = operation.window(case.kernel)
    laid_out = window.laid_out(x, fill)
    assert tuple(laid_out.shape[2:]) == window.extent(x.shape[2:])
    plain = Convolution(window.stride, (0,) * len(case.kernel), window.dilation, operation.groups)
    # What is laid out with something else than zero is the convolution of what lies above that.
    torch.testing.assert_close(
        plain(laid_out - fill, window.slid(weight), bias), operation(x - fill, weight, bias)
    )
    assert window.places(laid_out.shape[2:]) == tuple(operation(x, weight, bias).shape[2:])


@given(cases)
def test_a_window_that_reads_no_zeros_makes_one_value_of_ones(case: Case) -> None:
    operation, (x, weight, _) = case.operation, case.tensors()
    ones = operation(torch.ones_like(x), weight, None).flatten(2)
    if not operation.window(case.kernel).reads_zeros:
        torch.testing.assert_close(ones, ones[:, :, :1].expand_as(ones))


@pytest.mark.parametrize(
    "case",
    [
        Case(Convolution((2, 2), (1, 1), (1, 1), 1), (3, 3), 0),
        Case(TransposedConvolution((2, 2), (1, 1), (0, 0), (1, 1), 1), (3, 3), 0),
    ],
)
def test_a_layout_with_channels_last_is_kept(case: Case) -> None:
    x = case.tensors()[0].contiguous(memory_format=torch.channels_last)
    laid_out = case.operation.window(case.kernel).laid_out(x, 2.0)
    assert laid_out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid_out, case.operation.window(case.kernel).laid_out(x.contiguous(), 2.0))


def test_a_linear_layer_has_no_window_and_counts_tokens() -> None:
    operation, x = Linear(), torch.randn(2, 3, 5, 4)
    assert operation.window(()) == Window() and operation.window(()).pointwise and operation.groups == 1
    assert operation.places(x) == 15 and operation.arranged(x) is x
    places = torch.tensor([14, 2])
    assert torch.equal(operation.outputs_at(x, places), x.flatten(1, 2)[:, places].flatten(0, 1))
    assert torch.equal(operation.inputs_at(x, (), places), operation.outputs_at(x, places)[None])


@pytest.mark.parametrize(
    ("operation", "kernel", "pointwise", "zeros"),
    [
        (Convolution((1, 1), (0, 0), (1, 1), 1), (1, 1), True, False),
        (Convolution((1, 1), "same", (1, 1), 1), (1, 1), True, False),
        (Convolution((1, 1), (0, 1), (1, 1), 1), (1, 1), False, True),
        (Convolution((2, 1), (0, 0), (1, 1), 1), (1, 1), False, False),
        (Convolution((1, 1), "valid", (1, 1), 1), (3, 3), False, False),
        (Convolution((1, 1), "same", (1, 1), 1), (2, 2), False, True),
        (TransposedConvolution((1, 1), (0, 0), (0, 0), (1, 1), 1), (1, 1), True, False),
        (TransposedConvolution((1, 2), (0, 0), (0, 0), (1, 1), 1), (1, 1), False, True),
        (TransposedConvolution((1, 1), (1, 1), (0, 0), (1, 1), 1), (2, 2), False, False),
        (TransposedConvolution((1, 1), (2, 0), (0, 0), (1, 1), 1), (3, 1), False, False),
    ],
)
def test_windows_say_what_they_read(
    operation: Operation, kernel: tuple[int, ...], pointwise: bool, zeros: bool
) -> None:
    window = operation.window(kernel)
    assert (window.pointwise, window.reads_zeros) == (pointwise, zeros)
