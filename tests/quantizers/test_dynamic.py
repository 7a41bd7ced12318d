from math import log10

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import min_max
from tfmq.quantizers.dynamic import DynamicQuantizer

shapes = st.sampled_from([(3, 6), (2, 5, 6), (2, 3, 4, 6), (1, 1, 6)])
formats = st.builds(IntegerFormat, st.integers(2, 8), st.booleans())


@given(shapes, formats, st.sampled_from([(), (4, 2), (1, 2, 3)]), st.integers(0, 2**31))
def test_each_token_is_quantized_as_if_it_were_alone(
    shape: tuple[int, ...], fmt: IntegerFormat, segments: tuple[int, ...], seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    out = DynamicQuantizer(fmt, segments=segments)(x)
    for token, quantized in zip(x.flatten(0, -2), out.flatten(0, -2), strict=True):
        for part, found in zip(token.split(segments or (6,)), quantized.split(segments or (6,)), strict=True):
            scale, zero_point = min_max(part[None], fmt)
            assert torch.equal(found, fake_quantize(part, scale[0], zero_point[0], fmt.levels))


@given(shapes, formats, st.integers(0, 2**31))
def test_a_value_moves_by_a_step_of_its_own_token_at_most(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x[0] *= 1000  # no other token may notice
    quantizer = DynamicQuantizer(fmt)
    moved = (quantizer(x) - x).abs()
    # Where real zero falls between two codes, it is rounded to one, and an end of the range lies up to half a
    # step further out.
    assert bool((moved <= quantizer.rows(x).scale * (1 + 1e-4)).all())
    assert bool((moved[1:] <= 12 / (fmt.levels - 2)).all())


def test_it_needs_no_step_and_keeps_no_state() -> None:
    quantizer = DynamicQuantizer(IntegerFormat(8), segments=(4, 2))
    assert not quantizer.state_dict() and quantizer(torch.randn(2, 6)).shape == (2, 6)
    assert "dynamic by token, segments=2" in repr(quantizer)


@pytest.mark.parametrize("fmt", [IntegerFormat(8), IntegerFormat(4, symmetric=True)])
def test_the_zero_points_that_can_occur_are_those_that_do(fmt: IntegerFormat) -> None:
    quantizer = DynamicQuantizer(fmt, segments=(3, 3))
    possible = quantizer.zero_points()
    assert possible.shape[1] == 2
    x = torch.randn(4, 7, 6) + torch.linspace(-3, 3, 7)[:, None]
    assert set(quantizer.rows(x).zero_point.flatten().tolist()) <= set(possible[:, 0].tolist())


def test_an_outlier_channel_costs_its_own_group_resolution_and_no_other() -> None:
    x = torch.randn(512, 256)
    x[:, 100] = 64.0
    errors = [
        (DynamicQuantizer(IntegerFormat(8), segments=segments)(x) - x).square().sum()
        for segments in ((), (32,) * 8)
    ]
    # The seven groups without it have a step about sixteen times smaller.
    assert 10 * float(torch.log10(errors[0] / errors[1])) == pytest.approx(10 * log10(8), abs=0.5)


def test_segments_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 6 channels on axis 2, got an input of shape \(2, 3, 5\)"):
        DynamicQuantizer(IntegerFormat(8), segments=(4, 2))(torch.randn(2, 3, 5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_input_keeps_its_dtype_and_zeros_stay_zeros(dtype: torch.dtype) -> None:
    out = DynamicQuantizer(IntegerFormat(8))(torch.zeros(2, 3, dtype=dtype))
    assert out.dtype == dtype and bool((out == 0).all())


def test_gradients_pass_inside_the_range() -> None:
    x = torch.randn(3, 5, requires_grad=True)
    DynamicQuantizer(IntegerFormat(8))(x).sum().backward()
    assert x.grad is not None and bool((x.grad == 1).all())
