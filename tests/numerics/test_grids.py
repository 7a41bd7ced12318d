import dataclasses

import pytest
import torch
from torch import Tensor

from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import GRIDS, Grid, IntegerFormat, Table
from tfmq.quantizers.weight import fit_grid


@pytest.mark.parametrize(("bits", "levels", "middle"), [(2, 4, 2), (4, 16, 8), (8, 256, 128)])
def test_a_grid_has_two_to_the_bits_levels_and_a_middle(bits: int, levels: int, middle: int) -> None:
    assert (IntegerFormat(bits).levels, IntegerFormat(bits).middle) == (levels, middle)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16, 32])
def test_bits_outside_the_range_are_refused_by_value(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"2\.\.8, got {bits}\b"):
        IntegerFormat(bits)


def test_formats_are_values() -> None:
    assert IntegerFormat(4) == IntegerFormat(4, symmetric=False) != IntegerFormat(4, symmetric=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        IntegerFormat(4).bits = 8  # type: ignore[misc]


def test_small_floats_have_the_values_of_their_bits() -> None:
    assert Table("e2m1", GRIDS["e2m1"]).values[7:] == (0, 1, 2, 3, 4, 6, 8, 12), "0, 0.5, ... 6 in halves"
    assert GRIDS["e3m0"][7:] == (0, 1, 2, 4, 8, 16, 32, 64)
    assert GRIDS["e1m2"] == tuple(range(-7, 8)), "evenly spaced"
    assert GRIDS["e2m3"][31:] == (*range(16), *range(16, 32, 2), *range(32, 64, 4))
    for name in ("e1m2", "e2m1", "e3m0", "e2m3"):
        grid = Table(name, GRIDS[name])
        assert grid.bits == (6 if name == "e2m3" else 4) and grid.levels == 2**grid.bits - 1
        assert grid.middle == 0 in grid.values and grid.symmetric


def gaussian_error(name: str) -> float:
    weight = torch.randn(4, 100_000)
    grid = fit_grid(weight, Table(name, GRIDS[name]))
    return float((grid.decode(grid.encode(weight)) - weight).square().mean())


# Of unit Gaussian values on evenly spaced levels at their best (Max, 1960, table II): 2, 3, 5 and 9 levels.
@pytest.mark.parametrize(
    ("name", "bits", "error"),
    [("binary", 1, 0.3634), ("balanced3", 2, 0.1902), ("balanced5", 3, 0.0822), ("balanced9", 4, 0.0303)],
)
def test_balanced_and_binary_grids_err_as_even_levels_do(name: str, bits: int, error: float) -> None:
    assert Table(name, GRIDS[name]).bits == bits
    assert GRIDS[name] == tuple(-value for value in reversed(GRIDS[name]))
    # Ranges are searched for by another power than two, which moves them a little.
    assert gaussian_error(name) == pytest.approx(error, rel=0.01 if name == "binary" else 0.06)


def test_binary_weights_have_the_scale_of_least_squares_and_two_points_have_no_error() -> None:
    table, weight = Table("binary", GRIDS["binary"]), torch.randn(3, 500) * torch.logspace(-3, 3, 500)
    grid = fit_grid(weight, table)
    for share in (0.99, 1.01):
        other = dataclasses.replace(grid, scale=share * grid.scale)
        errors = [(one.decode(one.encode(weight)) - weight).double().square().sum(1) for one in (grid, other)]
        assert bool((errors[0] < errors[1]).all())
    two = torch.tensor([[0.3, -0.3, 0.3], [-2.0, 2.0, -2.0]])
    found = fit_grid(two, table)
    assert torch.equal(found.decode(found.encode(two)), two)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((0, 1), "3 values or more"),
        ((-1, 1, 2), "zero among them"),
        ((-1, 0, 0, 1), "ascending"),
        ((-129, 0, 1), "signed bytes"),
        ((-1, 0, 128), "signed bytes"),
    ],
)
def test_other_tables_are_refused_by_name(values: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"the (values of the )?grid odd .*|.*{message}") as caught:
        Table("odd", values)
    assert "odd" in str(caught.value) and message in str(caught.value)


def rounded(weight: Tensor, grid: Grid) -> float:
    fitted = fit_grid(weight, grid, method="min_max")
    return sqnr_db(weight, fitted.decode(fitted.encode(weight)))


def test_a_table_gains_where_values_crowd_at_zero_and_loses_where_they_are_even() -> None:
    # Expected square errors of rows with the largest magnitude 1, by integration over each cell: Laplace rows
    # of scale 1/8 have 0.105 b^2 on 15 even values and 0.047 b^2 on e2m1, even rows 1/588 and 0.00405.
    even, float4 = Table("e1m2", GRIDS["e1m2"]), Table("e2m1", GRIDS["e2m1"])
    laplace = torch.distributions.Laplace(0.0, 0.125).sample((8, 20000)).clamp(-1.0, 1.0)
    laplace[:, 0] = 1.0
    assert rounded(laplace, float4) > rounded(laplace, even) + 3
    flat = torch.rand(8, 20000) * 2 - 1
    flat[:, 0] = 1.0
    assert rounded(flat, float4) == pytest.approx(rounded(flat, even) - 3.8, abs=0.3)


def test_an_even_table_is_the_symmetric_integers() -> None:
    weight = torch.randn(4, 300)
    ends = IntegerFormat(4, symmetric=True), Table("e1m2", GRIDS["e1m2"])
    integers, table = (fit_grid(weight, grid, method="min_max") for grid in ends)
    torch.testing.assert_close(integers.scale, table.scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        integers.decode(integers.encode(weight)), table.decode(table.encode(weight)), rtol=1e-5, atol=1e-6
    )


def test_integers_of_codes_have_their_dtype_and_run_evenly_between_two() -> None:
    grid, zero = Table("e2m1", GRIDS["e2m1"]), torch.zeros(1)
    codes = torch.arange(15)
    assert grid.integers(codes.to(torch.int16), zero).dtype == torch.int16
    assert tuple(grid.integers(codes.to(torch.uint8), zero).tolist()) == tuple(
        value % 256 for value in grid.values
    )
    between = grid.integers(torch.tensor([7.5, 13.25], dtype=torch.float64), zero)
    assert between.tolist() == [0.5, 9.0] and between.dtype == torch.float64
