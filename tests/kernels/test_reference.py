"""The reference against the formulas of docs/format.md, written down once more in numpy and float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from tfmq.kernels.kernel import ACCUMULATOR, IntegerWeight, Rows
from tfmq.kernels.reference import ReferenceKernel, reference_product
from tfmq.numerics.operations import Convolution, Linear, Operation, TransposedConvolution

Array = np.ndarray[Any, np.dtype[Any]]
Cases = Callable[..., Any]
UNIT = 2.0**-24


def gamma(n: int) -> float:
    """Return a bound of the relative error of `n` roundings in float32."""
    return n * UNIT / (1 - n * UNIT)


def on_grid(x: Tensor, scale: Tensor, zero_point: Tensor, levels: int) -> Array:
    """Return `x_hat` in float64, its codes found in float32; `scale` and `zero_point` are one value for each
    sample, or for each token.
    """
    shape = (*scale.shape, *[1] * (x.ndim - scale.ndim))
    s, z = scale.numpy().reshape(shape), zero_point.numpy().astype(np.float32).reshape(shape)
    codes = np.clip(np.round(x.numpy().astype(np.float32) * (np.float32(1) / s)) + z, 0, levels - 1)
    return (codes.astype(np.float64) - z) * s.astype(np.float64)


def scattered(operation: TransposedConvolution, x: Array, weight: Array) -> Array:
    """Return a transposed convolution without a bias: one tap of the window after another is added where it
    falls, and the rim cut off.
    """
    kernel, places = weight.shape[2:], x.shape[2:]
    sizes = [
        (n - 1) * s + d * (k - 1) + 1 + more
        for n, s, d, k, more in zip(
            places, operation.stride, operation.dilation, kernel, operation.output_padding, strict=True
        )
    ]
    parts = []
    for part, rows in zip(
        np.split(x, operation.groups, axis=1), np.split(weight, operation.groups), strict=True
    ):
        out = np.zeros((len(x), len(rows), *sizes))
        for tap in np.ndindex(*kernel):
            starts = [t * d for t, d in zip(tap, operation.dilation, strict=True)]
            where = [
                slice(a, a + (n - 1) * s + 1, s)
                for a, n, s in zip(starts, places, operation.stride, strict=True)
            ]
            out[(..., *where)] += np.moveaxis(np.tensordot(part, rows[(..., *tap)], axes=(1, 1)), -1, 1)
        parts.append(out)
    inner = [slice(cut, size - cut) for cut, size in zip(operation.padding, sizes, strict=True)]
    return np.concatenate(parts, axis=1)[(..., *inner)]


def apply(operation: Operation, x: Array, weight: Array) -> Array:
    """Return the operation without a bias, in float64: explicit zeros at the borders, one window after
    another.
    """
    if isinstance(operation, Linear):
        return x @ weight.T
    if isinstance(operation, TransposedConvolution):
        return scattered(operation, x, weight)
    axes = tuple(range(2, x.ndim))
    assert isinstance(operation, Convolution) and not isinstance(operation.padding, str)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in operation.padding)])
    extent = tuple(d * (k - 1) + 1 for d, k in zip(operation.dilation, weight.shape[2:], strict=True))
    windows = sliding_window_view(x, extent, axis=axes)
    strided = tuple(slice(None, None, step) for step in operation.stride)
    dilated = tuple(slice(None, None, step) for step in operation.dilation)
    windows = windows[(slice(None), slice(None), *strided, *dilated)]
    outputs = []
    for part, kernel in zip(
        np.split(windows, operation.groups, axis=1), np.split(weight, operation.groups), strict=True
    ):
        summed = [1, *range(2 + len(axes), part.ndim)]
        outputs.append(np.moveaxis(np.tensordot(part, kernel, axes=(summed, range(1, kernel.ndim))), -1, 1))
    return np.concatenate(outputs, axis=1)


def expected(weight: IntegerWeight, x: Tensor, rows: Rows) -> tuple[Array, Array]:
    """Return the output in float64, and the sum of the magnitudes of what is added up in it."""
    total = magnitude = np.float64(0.0)
    widths = weight.segments or (x.shape[weight.operation.channel_axis],)
    columns = zip(
        x.split(widths, dim=weight.operation.channel_axis),
        rows.scale.unbind(-1),
        rows.zero_point.unbind(-1),
        weight.parts(),
        strict=True,
    )
    for part, scale, zero_point, (values, weight_scale) in columns:
        x_hat = on_grid(part, scale, zero_point, rows.levels)
        w_hat = values.double().numpy() * weight_scale.double().numpy().reshape(-1, *[1] * (values.ndim - 1))
        total = total + apply(weight.operation, x_hat, w_hat)
        magnitude = magnitude + apply(weight.operation, abs(x_hat), abs(w_hat))
    if weight.bias is not None:
        bias = weight.bias.double().numpy()
        bias = bias.reshape(-1, *[1] * (np.ndim(total) - 2)) if weight.operation.channel_axis == 1 else bias
        total, magnitude = total + bias, magnitude + abs(bias)
    return np.asarray(total), np.asarray(magnitude)


def anywhere(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape) - 0.5


@given(st.data())
def test_a_layer_is_the_formula_in_float64(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=anywhere))
    y, (exact, magnitude) = ReferenceKernel(weight, rows.levels)(x, rows), expected(weight, x, rows)
    assert y.dtype == torch.float32 and y.shape == exact.shape
    assert np.all(abs(y.double().numpy() - exact) <= gamma(rows.scale.shape[-1] + 3) * magnitude)


@given(st.data())
def test_mixed_rows_are_each_sample_alone(layer_cases: Cases, data: st.DataObject) -> None:
    weight, x, rows = data.draw(layer_cases(offset=anywhere))
    kernel = ReferenceKernel(weight, rows.levels)
    together = kernel(x, rows)
    for sample in range(len(x)):
        row = sample % len(rows.scale)
        alone = Rows(rows.scale[row : row + 1], rows.zero_point[row : row + 1], rows.levels)
        assert torch.equal(together[sample : sample + 1], kernel(x[sample : sample + 1], alone))


@given(st.data(), st.sampled_from([torch.float16, torch.bfloat16, torch.float64]))
def test_the_output_has_the_dtype_of_the_input(
    layer_cases: Cases, data: st.DataObject, dtype: torch.dtype
) -> None:
    weight, x, rows = data.draw(layer_cases(offset=anywhere))
    kernel = ReferenceKernel(weight, rows.levels)
    assert torch.equal(kernel(x.to(dtype), rows), kernel(x.to(dtype).float(), rows).to(dtype))


def test_sums_go_up_to_the_end_of_int32_and_no_further() -> None:
    rows = Rows(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8), 256)
    longest = ACCUMULATOR // (128 * 255)
    for length in (longest, longest + 1):
        weight = IntegerWeight(
            Linear(), torch.full((1, length), -128, dtype=torch.int16), torch.ones(1, 1), None
        )
        if length > longest:
            with pytest.raises(ValueError, match=rf"{length * 128 * 255} do not fit into int32"):
                ReferenceKernel(weight, 256)
        else:
            assert (
                float(ReferenceKernel(weight, 256)(torch.full((1, length), 300.0), rows))
                == -128 * 255 * length
            )


@given(st.integers(0, 2**31), st.sampled_from([(2,), (2, 3), ()]), st.booleans(), st.integers(2, 8))
def test_a_product_is_the_formula_in_float64(
    seed: int, batch: tuple[int, ...], mixed: bool, bits: int
) -> None:
    torch.manual_seed(seed)
    left, right = torch.randn(4, *batch, 5, 7), torch.randn(4, *batch, 7, 3)
    grids = [
        Rows(0.01 + torch.rand(n, 1), torch.randint(2**bits, (n, 1)).to(torch.uint8), 2**bits)
        for n in ((4, 4) if mixed else (1, 1))
    ]
    a, b = (
        on_grid(x, rows.scale, rows.zero_point, rows.levels)
        for x, rows in zip((left, right), grids, strict=True)
    )
    y = reference_product(left, grids[0], right, grids[1])
    assert y.dtype == torch.float32
    assert np.all(abs(y.double().numpy() - a @ b) <= gamma(3) * (abs(a) @ abs(b)))
