"""Steps of groups as multiples of a row's scale: sizes, the room for multiples, planted gains, and the price
beside steps of any size.
"""

from math import log10

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics.grids import GRIDS, Grid, IntegerFormat, Table
from tfmq.numerics.groups import FEWEST, SMALLEST, ends, group_size, has_room, largest
from tfmq.quantizers.weight import fit_grid

EVERY: list[Grid] = [IntegerFormat(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
EVERY += [Table(name, values) for name, values in GRIDS.items()]
ROOMY = [grid for grid in EVERY if has_room(grid)]


@given(st.lists(st.integers(1, 400), min_size=1, max_size=4), st.integers(SMALLEST, 300))
def test_groups_are_the_largest_that_divide_all_segments_and_are_not_them(
    widths: list[int], most: int
) -> None:
    sizes = [size for size in range(SMALLEST, most + 1) if all(width % size == 0 for width in widths)]
    expected = max(sizes, default=0)
    assert group_size(widths, most) == (0 if [expected] * len(widths) == widths else expected)


@pytest.mark.parametrize("grid", EVERY, ids=repr)
def test_the_largest_multiple_keeps_integers_in_signed_bytes_and_the_next_does_not(grid: Grid) -> None:
    zeros = torch.tensor([float(grid.middle)]) if grid.symmetric else torch.arange(grid.levels).float()
    low, high = ends(grid, zeros)
    most = largest(grid, zeros)
    assert bool((low * most >= -128).all() and (high * most <= 127).all())
    assert bool(((low * (most + 1) < -128) | (high * (most + 1) > 127)).all())
    assert has_room(grid) == bool((most >= FEWEST).all())


def test_uniform_grids_of_five_bits_and_floats_of_few_powers_leave_room() -> None:
    assert {(grid.bits, grid.symmetric) for grid in ROOMY if isinstance(grid, IntegerFormat)} == {
        *((bits, symmetric) for bits in range(2, 6) for symmetric in (False, True)),
        (6, True),
    }
    tables = {grid.name for grid in ROOMY if isinstance(grid, Table)}
    assert {"e1m2", "e2m1"} <= tables and not {"e3m0", "e2m3"} & tables


@pytest.mark.parametrize("grid", ROOMY, ids=repr)
@pytest.mark.parametrize("method", ["search", "min_max"])
@pytest.mark.parametrize("segments", [(), (32, 64)])
def test_integers_of_groups_are_signed_bytes_and_codes_the_nearest(
    grid: Grid, method: str, segments: tuple[int, ...]
) -> None:
    weight = torch.randn(6, 96, 3) * torch.logspace(-2, 2, 96)[:, None]
    weight[1, :16] = 0
    found = fit_grid(weight, grid, segments=segments, group=16, method=method)
    assert found.group == 16 and found.multiplier is not None
    assert found.scale.shape == (6, max(1, len(segments))) and found.zero_point.shape == (6, 6)
    codes = found.encode(weight)
    integers = found.integers(codes)
    assert bool((integers == integers.round()).all() and (integers >= -128).all() and (integers <= 127).all())
    values = torch.stack([found.decode(torch.full_like(codes, k)) for k in range(grid.levels)])
    nearest = (values - weight).abs().amin(dim=0)
    error = (found.decode(codes) - weight).abs()
    torch.testing.assert_close(error, nearest, rtol=1e-4, atol=1e-6)
    if getattr(grid, "name", "") != "binary":
        assert torch.equal(found.decode(codes)[1, :16], torch.zeros(16, 3))
    if method == "min_max":
        steps = found.steps(3)
        widest = max(1, *(b - a for a, b in zip(*(ends_of(grid)[i:] for i in (0, 1)), strict=False)))
        # Half a step of the widest gap, and half of a unit more where the zero-point was rounded.
        assert bool((error <= (widest + 1) / 2 * steps * (1 + 1e-4)).all())


def ends_of(grid: Grid) -> list[float]:
    zero = torch.full((grid.levels,), float(grid.middle))
    values: list[float] = grid.integers(torch.arange(grid.levels).float(), zero).tolist()
    return values


def planted(large: float, *, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return a weight with columns of scale 1 and 1 / `large` in turns of `size`, and inputs inversely so."""
    turns = torch.tensor([1.0, 1 / large]).repeat_interleave(size).repeat(4)
    return (2 * torch.rand(48, len(turns)) - 1) * turns, torch.randn(256, len(turns)) / turns


def error_of(weight: Tensor, x: Tensor, group: int) -> float:
    grid = fit_grid(weight, IntegerFormat(4), group=group)
    return float(((grid.decode(grid.encode(weight)) - weight) @ x.mT).double().square().sum())


@pytest.mark.parametrize("large", [4.0, 16.0])
def test_groups_along_planted_scales_gain_what_follows_from_their_ratio(large: float) -> None:
    weight, x = planted(large)
    whole, right, wide = (error_of(weight, x, group) for group in (0, 32, 64))
    # Errors of a step that fits the large columns, under the large inputs of the small ones: (1 + M^2) / 2.
    assert 10 * log10(whole / right) == pytest.approx(10 * log10((1 + large**2) / 2), abs=1.5)
    # Each group of 64 holds both.
    assert abs(10 * log10(whole / wide)) < 1.5


def test_a_ratio_beyond_the_multiples_is_reached_as_far_as_they_go() -> None:
    weight, x = planted(64.0)
    gain = 10 * log10(error_of(weight, x, 0) / error_of(weight, x, 32))
    # In units of the large columns, whose step is 2 / 15: the small ones are all rounded to zero, with a
    # third of their square for error; with groups their step is a sixteenth of that, not the 64th part.
    row, step = 2 / 15, 2 / 15 / 16
    whole, grouped = row**2 / 12 + 1 / 3, row**2 / 12 + 64**2 * step**2 / 12
    assert gain == pytest.approx(10 * log10(whole / grouped), abs=1.5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [32, 128])
def test_multiples_cost_a_quarter_of_a_decibel_beside_steps_of_any_size(symmetric: bool, size: int) -> None:
    weight, fmt = torch.randn(64, 512), IntegerFormat(4, symmetric)
    parts = weight.reshape(-1, size)
    free, own = fit_grid(parts, fmt), fit_grid(weight, fmt, group=size)
    errors = [
        float((grid.decode(grid.encode(value)) - value).square().sum())
        for grid, value in ((free, parts), (own, weight))
    ]
    assert 10 * log10(errors[1] / errors[0]) < 0.25


def test_a_weight_without_groups_and_one_that_does_not_divide_are_fitted_as_rows() -> None:
    weight = torch.randn(8, 97)
    plain = fit_grid(weight, IntegerFormat(4))
    for fmt, group, width in ((IntegerFormat(4), 64, 97), (IntegerFormat(8), 32, 96)):
        part = weight[:, :width]
        grid, row = fit_grid(part, fmt, group=group), fit_grid(part, fmt)
        assert grid.group == 0 and grid.multiplier is None
        assert torch.equal(grid.scale, row.scale) and torch.equal(grid.encode(part), row.encode(part))
    assert torch.equal(plain.steps(2), plain.scale)
