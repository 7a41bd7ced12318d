from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics import ranges as module_under_test
from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import SMALLEST_SCALE, from_range, min_max, search, share_zero_point

FORMATS = st.builds(IntegerFormat, st.integers(2, 8), symmetric=st.booleans())
BOUNDS = st.floats(-1e4, 1e4, width=32)
SPREADS = st.sampled_from([1e-6, 1e-2, 1.0, 1e4])
SHIFTS = st.sampled_from([-5.0, -0.5, 0.0, 0.5, 5.0])


def draw(seed: int, *, spread: float, shift: float, rows: int = 3, columns: int = 50) -> Tensor:
    """Heavy-tailed values, so that clipping pays at few bits."""
    normal = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (normal.pow(3) + shift) * spread


def quantized(values: Tensor, scale: Tensor, zero: Tensor, fmt: IntegerFormat) -> Tensor:
    return fake_quantize(values, scale[:, None], zero[:, None], fmt.levels)


@given(BOUNDS, BOUNDS, FORMATS)
def test_real_zero_lies_on_every_grid(one: float, other: float, fmt: IntegerFormat) -> None:
    scale, zero = from_range(torch.tensor([min(one, other)]), torch.tensor([max(one, other)]), fmt)
    assert scale > 0
    assert float(zero) == int(zero) and 0 <= zero <= fmt.levels - 1
    assert fake_quantize(torch.zeros(1), scale, zero, fmt.levels) == 0


@given(BOUNDS, BOUNDS, FORMATS, st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_inside_the_range_the_error_is_at_most_half_a_step(
    one: float, other: float, fmt: IntegerFormat, positions: list[float]
) -> None:
    low, high = torch.tensor([min(one, other, 0.0)]), torch.tensor([max(one, other, 0.0)])
    scale, zero = from_range(low, high, fmt)
    x = low + (high - low) * torch.tensor(positions)
    assert ((quantized(x[None], scale, zero, fmt) - x).abs() <= scale * 0.5 + 1e-6 * x.abs()).all()


@given(BOUNDS, BOUNDS, st.integers(2, 8))
def test_symmetric_grids_mirror(one: float, other: float, bits: int) -> None:
    fmt = IntegerFormat(bits, symmetric=True)
    low, high = torch.tensor([min(one, other)]), torch.tensor([max(one, other)])
    scale, zero = from_range(low, high, fmt)
    assert float(zero) == fmt.middle
    x = torch.linspace(-1, 1, 41) * max(abs(one), abs(other))
    values = quantized(x[None], scale, zero, fmt)
    assert torch.equal(values, -values.flip(1))


@pytest.mark.parametrize("fit", [min_max, search])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_comes_out_of_a_relu_has_an_unsigned_grid(
    fit: Callable[[Tensor, IntegerFormat], tuple[Tensor, Tensor]], bits: int
) -> None:
    values = draw(0, spread=1.0, shift=0.0).relu()
    scale, zero = fit(values, IntegerFormat(bits))
    assert not zero.any()
    found = quantized(values, scale, zero, IntegerFormat(bits)) / scale[:, None]
    assert torch.equal(found.round(), (values / scale[:, None]).round().clamp(0, 2**bits - 1))


def test_the_grid_covers_exactly_the_extremes() -> None:
    scale, zero = min_max(
        torch.tensor([[-1.0, 0.25, 2.0], [0.5, 1.0, 3.0], [-4.0, -2.0, -1.0]]), IntegerFormat(2)
    )
    assert torch.allclose(scale, torch.tensor([1.0, 1.0, 4 / 3]))
    assert zero.tolist() == [1.0, 0.0, 3.0]


def test_a_row_of_zeros_has_a_grid_that_keeps_zero() -> None:
    for fit in (min_max, search):
        scale, zero = fit(torch.zeros(2, 5), IntegerFormat(4))
        assert (scale > 0).all()
        assert (quantized(torch.zeros(2, 5), scale, zero, IntegerFormat(4)) == 0).all()


def loss(values: Tensor, scale: Tensor, zero: Tensor, fmt: IntegerFormat, power: float = 2.4) -> Tensor:
    return (quantized(values, scale, zero, fmt) - values).abs().pow(power).mean(dim=1)


@given(st.integers(0, 2**31), FORMATS, SPREADS, SHIFTS)
def test_search_is_never_worse_than_the_extremes_in_the_searched_error(
    seed: int, fmt: IntegerFormat, spread: float, shift: float
) -> None:
    values = draw(seed, spread=spread, shift=shift)
    assert (loss(values, *search(values, fmt), fmt) <= loss(values, *min_max(values, fmt), fmt)).all()


def test_search_takes_the_best_of_the_documented_factors() -> None:
    fmt, values = IntegerFormat(3), draw(1, spread=1.0, shift=0.0)
    factors = [1.0 - k / (1.25 * 80) for k in range(80)]
    assert factors[-1] == pytest.approx(0.21)
    candidates = [from_range(values.amin(1) * factor, values.amax(1) * factor, fmt) for factor in factors]
    best = torch.stack([loss(values, *candidate, fmt) for candidate in candidates]).amin(dim=0)
    assert torch.equal(loss(values, *search(values, fmt), fmt), best)
    assert (best < loss(values, *min_max(values, fmt), fmt)).any(), (
        "the values must tell search from the extremes"
    )


def test_search_looks_inside_a_given_range() -> None:
    values = torch.linspace(-1, 1, 101)[None]
    scale, _ = search(values, IntegerFormat(8), low=torch.tensor([-1.0]), high=torch.tensor([3.0]), shrinks=1)
    assert float(scale) == pytest.approx(4 / 255)


def test_rows_are_fitted_apart() -> None:
    values = draw(2, spread=1.0, shift=0.0)
    together = search(values, IntegerFormat(4))
    for row in range(3):
        alone = search(values[row : row + 1], IntegerFormat(4))
        assert torch.equal(together[0][row : row + 1], alone[0]) and torch.equal(
            together[1][row : row + 1], alone[1]
        )


def growth(low: float, high: float, scale: float, zero: int, top: int) -> float:
    """How much wider than `scale` the steps of a grid must be that covers `[low, high]` around `zero`; by the
    definition, in Python's floats.
    """
    below = 0.0 if low == 0 else float("inf") if zero == 0 else -low / zero
    above = 0.0 if high == 0 else float("inf") if zero == top else high / (top - zero)
    return max(below, above) / scale


@given(st.integers(0, 2**31), st.integers(2, 8), st.integers(1, 6), SHIFTS)
def test_no_shared_zero_point_costs_less_than_the_chosen_one(
    seed: int, bits: int, rows: int, shift: float
) -> None:
    fmt = IntegerFormat(bits)
    scale, zero = min_max(draw(seed, spread=1.0, shift=shift, rows=rows), fmt)
    shared, chosen = share_zero_point(scale, zero, fmt)
    top, grids = fmt.levels - 1, list(zip(scale.tolist(), zero.tolist(), strict=True))
    costs = [
        sum(growth(-z * s, (top - z) * s, s, candidate, top) ** 2 for s, z in grids)
        for candidate in range(fmt.levels)
    ]
    assert len(set(chosen.tolist())) == 1 and 0 <= int(chosen[0]) <= top
    assert costs[int(chosen[0])] <= min(costs) * (1 + 1e-9)
    assert torch.allclose(
        (shared / scale).double().square().sum(), torch.tensor(min(costs), dtype=torch.float64), rtol=1e-5
    )
    # Nothing that the rows covered is cut off.
    assert (-chosen * shared <= -zero * scale * (1 - 1e-6)).all() and (
        (top - chosen) * shared >= (top - zero) * scale * (1 - 1e-6)
    ).all()


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([(-1.0, 1.02), (-10.0, 10.2)], [126, 126]),
        ([(0.0, 5.0), (0.0, 1.0)], [0, 0]),
        ([(-5.0, 0.0), (-1.0, 0.0)], [255, 255]),
        ([(-64.0, 191.0), (-6.4, 19.1)], [64, 64]),
        # One row needs one side, the other the other: the cost (255 / z)**2 + (255 / (255 - z))**2 is least
        # in the middle, the lower of two.
        ([(-1.0, 0.0), (0.0, 1.0)], [127, 127]),
    ],
)
def test_the_shared_zero_point_in_closed_form(ranges: list[tuple[float, float]], expected: list[int]) -> None:
    low, high = (torch.tensor(column) for column in zip(*ranges, strict=True))
    assert (
        share_zero_point(*from_range(low, high, IntegerFormat(8)), IntegerFormat(8))[1].tolist() == expected
    )


def test_rows_that_agree_keep_their_grids() -> None:
    for fmt, zero in (
        (IntegerFormat(8), 37.0),
        (IntegerFormat(8, symmetric=True), 128.0),
        (IntegerFormat(4), 0.0),
        (IntegerFormat(4), 15.0),
    ):
        scale = torch.tensor([0.5, 0.01, 3.0])
        shared, chosen = share_zero_point(scale, torch.full((3,), zero), fmt)
        assert torch.equal(shared, scale) and chosen.tolist() == [zero] * 3


def test_a_row_of_zeros_has_no_say_and_no_other_scale() -> None:
    low, high = torch.tensor([-3.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 0.0])
    scale, zero = from_range(low, high, IntegerFormat(8))
    shared, chosen = share_zero_point(scale, zero, IntegerFormat(8))
    assert chosen.tolist() == [191.0] * 3 and torch.allclose(
        shared, torch.tensor([4 / 255, SMALLEST_SCALE, SMALLEST_SCALE])
    )
    nothing = share_zero_point(scale[1:], torch.tensor([0.0, 7.0]), IntegerFormat(8))
    assert nothing[1].tolist() == [0.0, 0.0] and torch.equal(nothing[0], scale[1:])


def test_a_shared_zero_point_is_one_of_those_allowed() -> None:
    low, high = torch.tensor([-1.0, -3.0]), torch.tensor([4.0, 1.0])
    scale, zero = from_range(low, high, IntegerFormat(8))
    for allowed in ((128,), (0, 128), (40, 90, 200)):
        shared, chosen = share_zero_point(scale, zero, IntegerFormat(8), allowed=allowed)
        assert int(chosen[0]) in allowed and (chosen * shared >= zero * scale * 0.999).all()
    assert share_zero_point(
        *from_range(torch.zeros(2), high, IntegerFormat(8)), IntegerFormat(8), allowed=(0, 128)
    )[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match=r"no zero-point of \[0\]"):
        share_zero_point(scale, zero, IntegerFormat(8), allowed=(0,))


@pytest.mark.parametrize("fmt", [IntegerFormat(4), IntegerFormat(8, symmetric=True)])
def test_chunks_and_shared_memory_leave_the_search_as_it_is_written(
    monkeypatch: pytest.MonkeyPatch, fmt: IntegerFormat
) -> None:
    values = (
        torch.randn(7, 50, generator=torch.Generator().manual_seed(0)) + torch.linspace(-1, 1, 7)[:, None]
    )
    low, high = values.amin(dim=1), values.amax(dim=1)
    grids = [from_range(low * factor, high * factor, fmt) for factor in (1.0 - k / 100 for k in range(80))]
    errors = [
        (fake_quantize(values, scale[:, None], zero[:, None], fmt.levels) - values).abs().pow(2.4).mean(dim=1)
        for scale, zero in grids
    ]
    best = torch.stack(errors).argmin(dim=0)
    expected = [torch.stack(column)[best, torch.arange(7)] for column in zip(*grids, strict=True)]
    for chunk in (1, 100, 350, 10_000):
        monkeypatch.setattr(module_under_test, "CHUNK", chunk)
        assert all(
            torch.equal(one, other) for one, other in zip(search(values, fmt), expected, strict=True)
        ), chunk
