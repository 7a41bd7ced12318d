import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tfmq.numerics.compensation import (
    CodeGrid,
    Quadratic,
    compensate,
    feedback,
    refit,
    sweep,
)
from tfmq.numerics.grids import Grid, IntegerFormat, Table
from tfmq.numerics.segments import numbers

LEVELS = 8
UNEVEN = Table("uneven", (-8, -4, -2, -1, 0, 1, 3, 6))
FORMATS = (IntegerFormat(3), UNEVEN)


def problem(
    seed: int, *, groups: int = 1, rows: int = 3, columns: int = 5, fmt: Grid = FORMATS[0]
) -> tuple[Quadratic, CodeGrid]:
    """Return correlated inputs' error and a grid that the targets fill."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(groups, 4 * columns, columns, generator=generator) @ torch.randn(
        groups, columns, columns, generator=generator
    )
    hessian = inputs.mT @ inputs / (4 * columns) + 0.01 * torch.eye(columns)
    target = torch.randn(groups, rows, columns, generator=generator)
    scale = 0.3 if fmt is UNEVEN else 0.6
    zero_point = 0.0 if fmt is UNEVEN else 4.0
    grid = CodeGrid(fmt, torch.full_like(target, scale), torch.full_like(target, zero_point))
    return Quadratic(target, hessian), grid


def total(quadratic: Quadratic, grid: CodeGrid, codes: Tensor) -> float:
    return float(quadratic.error(grid.decode(codes)).sum())


def test_the_error_is_that_of_the_outputs() -> None:
    inputs, weight, target = (
        torch.randn(50, 4).double(),
        torch.randn(1, 2, 4).double(),
        torch.randn(1, 2, 4).double(),
    )
    quadratic = Quadratic(target, (inputs.mT @ inputs)[None])
    expected = (inputs @ (weight - target)[0].mT).square().sum(dim=0)
    torch.testing.assert_close(quadratic.error(weight)[0], expected)


def test_without_correlation_feedback_is_nearest_rounding() -> None:
    quadratic, grid = problem(0, columns=200)
    quadratic = Quadratic(quadratic.target, torch.diag(torch.rand(200) + 0.1)[None])
    assert torch.equal(feedback(quadratic, grid), grid.nearest(quadratic.target))


@pytest.mark.parametrize("fmt", FORMATS, ids=["uniform", "table"])
@pytest.mark.parametrize("columns", [1, 5, 64, 150])
def test_feedback_moves_the_rest_to_its_least_squares_solution(columns: int, fmt: Grid) -> None:
    quadratic, grid = problem(1, columns=columns, fmt=fmt)
    target, hessian = quadratic.target[0].double(), quadratic.hessian[0].double()
    values, expected = target.clone(), torch.zeros_like(target)
    for j in range(columns):
        expected[:, j] = grid.nearest(values[None].float())[0, :, j]
        values[:, j] = grid.decode(expected[None].float())[0, :, j].double()
        if j + 1 < columns:
            fixed = (values - target)[:, : j + 1] @ hessian[: j + 1, j + 1 :]
            values[:, j + 1 :] = (
                target[:, j + 1 :] - torch.linalg.solve(hessian[j + 1 :, j + 1 :], fixed.mT).mT
            )
    # A tie of rounding may fall either way in the other precision.
    assert (feedback(quadratic, grid)[0] != expected).double().mean() < 0.01


@given(st.integers(0, 10**6), st.integers(1, 3), st.integers(1, 90), st.sampled_from(FORMATS))
def test_sweeps_never_add_error_and_end_where_no_single_code_can_improve(
    seed: int, groups: int, columns: int, fmt: Grid
) -> None:
    quadratic, grid = problem(seed, groups=groups, columns=columns, fmt=fmt)
    codes = grid.nearest(quadratic.target)
    before = total(quadratic, grid, codes)
    for _ in range(60):
        moved = sweep(quadratic, grid, codes)
        after = total(quadratic, grid, codes)
        assert after <= before * (1 + 1e-4) + 1e-4
        before = after
        if not moved:
            break
    assert bool(((codes >= 0) & (codes < LEVELS) & (codes == codes.round())).all())
    for column, shift in itertools.product(range(min(columns, 6)), (-1.0, 1.0)):
        other = codes.clone()
        other[:, :, column] = (other[:, :, column] + shift).clamp(0, LEVELS - 1)
        assert bool(
            (
                quadratic.error(grid.decode(other)) >= quadratic.error(grid.decode(codes)) * (1 - 1e-3) - 1e-4
            ).all()
        )


@given(st.integers(0, 10**6), st.sampled_from(FORMATS))
def test_compensation_lies_between_the_best_codes_and_the_nearest(seed: int, fmt: Grid) -> None:
    quadratic, grid = problem(seed, rows=2, columns=4, fmt=fmt)
    codes, fitted = compensate(quadratic, grid, torch.zeros(4, dtype=torch.int64), sweeps=5, refitted=False)
    assert torch.equal(fitted.scale, grid.scale)
    every = torch.tensor(list(itertools.product(range(LEVELS), repeat=4)), dtype=torch.float32)
    for row in range(2):
        alone = Quadratic(quadratic.target[:, row : row + 1].expand(1, len(every), 4), quadratic.hessian)
        values = fmt.integers(every, torch.tensor(4.0)) * grid.scale[0, 0, 0]
        best = float(alone.error(values[None]).min())
        found = float(quadratic.error(grid.decode(codes))[0, row])
        nearest = float(quadratic.error(grid.decode(grid.nearest(quadratic.target)))[0, row])
        assert best * (1 - 1e-4) - 1e-5 <= found <= nearest


def test_compensation_halves_the_error_on_correlated_inputs() -> None:
    quadratic, grid = problem(3, rows=16, columns=96)
    codes, fitted = compensate(quadratic, grid, torch.zeros(96, dtype=torch.int64), sweeps=5)
    assert total(quadratic, fitted, codes) < 0.5 * total(quadratic, grid, grid.nearest(quadratic.target))


def test_groups_do_not_know_of_each_other() -> None:
    quadratic, grid = problem(4, groups=3, columns=70)
    codes, fitted = compensate(quadratic, grid, torch.zeros(70, dtype=torch.int64), sweeps=3)
    alone = Quadratic(quadratic.target[1:2], quadratic.hessian[1:2])
    one, scale = compensate(
        alone,
        CodeGrid(grid.format, grid.scale[1:2], grid.zero_point[1:2]),
        torch.zeros(70, dtype=torch.int64),
        sweeps=3,
    )
    assert (codes[1] != one[0]).double().mean() < 0.02
    assert float(quadratic.error(fitted.decode(codes))[1].sum()) == pytest.approx(
        float(alone.error(scale.decode(one)).sum()), rel=0.05
    )


def test_refitted_scales_are_the_least_squares_ones() -> None:
    quadratic, grid = problem(5, rows=2, columns=6)
    segment = numbers((1, 2), 3, 2)
    assert segment.tolist() == [0, 0, 1, 1, 1, 1]
    codes = grid.nearest(quadratic.target)
    # Segments are refitted in turns: after many, no scale can improve.
    for _ in range(200):
        grid = refit(quadratic, grid, codes, segment)
    root = torch.linalg.cholesky(quadratic.hessian[0]).mT
    for row in range(2):
        columns = (codes - grid.zero_point)[0, row]
        design = torch.stack([root @ torch.where(segment == k, columns, 0.0) for k in (0, 1)], dim=1)
        expected = torch.linalg.lstsq(design, root @ quadratic.target[0, row]).solution
        torch.testing.assert_close(grid.scale[0, row, [0, 2]], expected, rtol=1e-3, atol=1e-4)


def test_a_row_of_zeros_keeps_its_scale() -> None:
    quadratic, grid = problem(6)
    codes = torch.full_like(quadratic.target, 4.0)
    assert torch.equal(refit(quadratic, grid, codes, torch.zeros(5, dtype=torch.int64)).scale, grid.scale)
