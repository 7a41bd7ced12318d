import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import min_max, search
from tfmq.quantizers.weight import AdaptiveRounding, fit_grid

FORMATS = st.builds(IntegerFormat, st.integers(2, 8), symmetric=st.booleans())
SHAPES = st.sampled_from([(3, 6), (4, 6, 3), (2, 6, 3, 3), (2, 6, 1, 2, 3)])
SEEDS = st.integers(0, 2**31)


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(SHAPES, FORMATS, SEEDS, st.sampled_from(["search", "min_max"]))
def test_each_output_channel_is_fitted_apart(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int, method: str
) -> None:
    weight = draw(shape, seed)
    grid = fit_grid(weight, fmt, method=method)
    scale, zero = {"search": search, "min_max": min_max}[method](weight.flatten(1), fmt)
    assert torch.equal(grid.scale, scale[:, None]) and torch.equal(grid.zero_point, zero[:, None])


@given(SHAPES, FORMATS, SEEDS)
def test_decoded_codes_are_torchs_fake_quantization(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int
) -> None:
    weight = draw(shape, seed)
    grid = fit_grid(weight, fmt)
    expected = torch.fake_quantize_per_channel_affine(
        weight, grid.scale[:, 0], grid.zero_point[:, 0].to(torch.int32), 0, 0, fmt.levels - 1
    )
    assert torch.equal(grid.decode(grid.encode(weight)), expected)


@given(SHAPES, FORMATS, SEEDS, st.sampled_from([(4, 2), (1, 2, 3)]))
def test_segments_are_fitted_and_coded_as_slices(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int, widths: tuple[int, ...]
) -> None:
    weight = draw(shape, seed)
    weight[:, widths[0] :] *= 10
    grid = fit_grid(weight, fmt, segments=widths)
    assert grid.scale.shape == (shape[0], len(widths))
    slices = [fit_grid(part, fmt) for part in weight.split(widths, dim=1)]
    codes = torch.cat(
        [part.encode(piece) for part, piece in zip(slices, weight.split(widths, dim=1), strict=True)], dim=1
    )
    values = torch.cat(
        [part.decode(piece) for part, piece in zip(slices, codes.split(widths, dim=1), strict=True)], dim=1
    )
    assert torch.equal(grid.encode(weight), codes)
    assert torch.equal(grid.decode(codes), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_grids_of_half_precision_weights_are_fitted_in_single_precision(dtype: torch.dtype) -> None:
    weight = draw((3, 6), 0).to(dtype)
    half, single = fit_grid(weight, IntegerFormat(4)), fit_grid(weight.float(), IntegerFormat(4))
    assert half.scale.dtype == torch.float32 and torch.equal(half.scale, single.scale)
    assert torch.equal(half.encode(weight), single.encode(weight.float()))


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(KeyError, match="guess"):
        fit_grid(torch.ones(2, 2), IntegerFormat(4), method="guess")


@given(SHAPES, FORMATS, SEEDS)
def test_soft_rounding_starts_at_full_precision_inside_the_range(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int
) -> None:
    weight = draw(shape, seed)
    grid = fit_grid(weight, fmt, method="min_max")
    scale = grid.steps(weight.ndim)
    soft = grid.decode(AdaptiveRounding(weight, grid).codes(hard=False))
    lowest, highest = (grid.decode(torch.full_like(weight, code)) for code in (0, fmt.levels - 1))
    expected = weight.clamp(lowest, highest)
    assert ((soft - expected).abs() <= scale * 2e-4 + 1e-6).all()


@given(SHAPES, FORMATS, SEEDS)
def test_hard_codes_start_at_the_nearest_and_stay_within_one_step(
    shape: tuple[int, ...], fmt: IntegerFormat, seed: int
) -> None:
    weight = draw(shape, seed)
    grid = fit_grid(weight, fmt)
    rounding = AdaptiveRounding(weight, grid)
    nearest = grid.encode(weight)
    scaled = weight / grid.steps(weight.ndim)
    clear = (scaled - scaled.floor() - 0.5).abs() > 1e-4
    assert torch.equal(rounding.codes(hard=True)[clear], nearest[clear])
    rounding.logits.data.copy_(draw(shape, seed + 1) * 5)
    codes = rounding.codes(hard=True)
    assert ((codes - nearest).abs() <= 1).all()
    assert torch.equal(codes, codes.round()) and codes.min() >= 0 and codes.max() <= fmt.levels - 1


def test_gradients_reach_every_logit_inside_the_range() -> None:
    weight = draw((3, 8), 0)
    rounding = AdaptiveRounding(weight, fit_grid(weight, IntegerFormat(4), method="min_max"))
    rounding.grid.decode(rounding.codes(hard=False)).sum().backward()
    soft = rounding.soft()
    free = (soft > 0) & (soft < 1) & (rounding.floor >= 0) & (rounding.floor < 15)
    assert free.sum() > 12 and (rounding.logits.grad[free] > 0).all()
