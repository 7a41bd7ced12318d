"""Integer weights of least quadratic error: rounding with error feedback, coordinate descent, scales by least
squares.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tfmq.numerics.grids import Grid

# Number of columns that are rounded one by one before a matrix product updates the rest.
BLOCK = 64
# Coordinate descent ends when a sweep moves less than this share of the codes.
WORTHWHILE = 1e-3


@dataclass(frozen=True)
class Quadratic:
    """The error `(w - target) hessian (w - target)^T` of each weight row `w`.

    `target` is `[G, R, n]`: R rows of n columns, for each of G groups that see inputs of their own. `hessian`
    is `[G, n, n]`, positive definite.
    """

    target: Tensor
    hessian: Tensor

    def gradient(self, values: Tensor) -> Tensor:
        """Return half the gradient at weights `[G, R, n]`."""
        return (values - self.target) @ self.hessian

    def error(self, values: Tensor) -> Tensor:
        """Return the error of each row of the weights, `[G, R]`."""
        return (self.gradient(values) * (values - self.target)).sum(dim=2)

    def to(self, dtype: torch.dtype) -> "Quadratic":
        """Return the same error in another dtype."""
        return Quadratic(self.target.to(dtype), self.hessian.to(dtype))

    def ordered(self, order: Tensor) -> "Quadratic":
        """Return the same error for columns in the `order` `[G, n]`."""
        rows = self.hessian.gather(1, order[:, :, None].expand_as(self.hessian))
        return Quadratic(in_order(self.target, order), in_order(rows, order))


@dataclass(frozen=True)
class CodeGrid:
    """The grids of weights `[G, R, n]`: what codes stand for, and `scale` and `zero_point` of each entry."""

    format: Grid
    scale: Tensor
    zero_point: Tensor

    def nearest(self, values: Tensor) -> Tensor:
        """Return the nearest codes, as integers in float."""
        return self.format.nearest_(values / self.scale + self.zero_point, None)

    def decode(self, codes: Tensor) -> Tensor:
        """Return the values of codes."""
        return self.format.integers(codes, self.zero_point) * self.scale

    def ordered(self, order: Tensor) -> "CodeGrid":
        """Return the grids of the columns in the `order` `[G, n]`."""
        return replace(self, scale=in_order(self.scale, order), zero_point=in_order(self.zero_point, order))


class _Columns:
    """The grids of some columns, and their codes, column by column: `[n, G, R]`, so that what one column
    needs lies together.
    """

    def __init__(self, grid: CodeGrid, start: int, stop: int) -> None:
        self.scale, self.zero_point = (
            _columns_first(values[:, :, start:stop]) for values in (grid.scale, grid.zero_point)
        )
        self.codes = torch.empty_like(self.scale)
        self.format = grid.format

    def nearest(self, number: int, values: Tensor) -> Tensor:
        """Return the nearest codes of values `[G, R]` of a column."""
        return self.format.nearest_((values / self.scale[number]).add_(self.zero_point[number]), None)

    def decode(self, number: int, codes: Tensor) -> Tensor:
        """Return the values of codes `[G, R]` of a column."""
        return self.format.integers(codes, self.zero_point[number]).mul_(self.scale[number])


def _columns_first(values: Tensor) -> Tensor:
    """Return a copy of `[G, R, n]` as `[n, G, R]`."""
    return values.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)


def in_order(values: Tensor, order: Tensor) -> Tensor:
    """Return the last axis of `values` `[G, R, n]` in the `order` `[G, n]`."""
    return values.gather(2, order[:, None, :].expand_as(values))


def feedback(problem: Quadratic, grid: CodeGrid) -> Tensor:
    """Round column by column, each time moving what is not rounded yet to make up for the error (GPTQ,
    Frantar et al., 2023, algorithm 1).

    The published form inverts the hessian and factors the inverse. With the upper triangular `R` of
    `H = R R^T` the error is `|e R|^2` for `e = w - w_hat`, and entry j of `e R` holds the errors of columns
    up to j alone: column j makes up for those before it where it is `w_j + (e R)_j / R_jj`. These are the
    same codes, for a quarter of the arithmetic (GPTQ as Babai's nearest plane: Chen et al., 2025, arXiv
    2507.18553).
    """
    # The factor of the matrix in reversed order is lower triangular, so that this one is upper.
    root = torch.linalg.cholesky(problem.hessian.double().flip(1, 2)).float().flip(1, 2)
    target = problem.target.float()
    codes, owed = torch.empty_like(target), torch.zeros_like(target)
    for start in range(0, target.shape[2], BLOCK):
        stop = min(start + BLOCK, target.shape[2])
        inner, local = root[:, start:stop, start:stop], _Columns(grid, start, stop)
        block, debts = (_columns_first(values[:, :, start:stop]) for values in (target, owed))
        rows, errors = inner.permute(1, 2, 0)[..., None].contiguous(), torch.empty_like(block)
        for j, column in enumerate(block):
            code = local.nearest(j, column + debts[j] / rows[j, j])
            error = torch.sub(column, local.decode(j, code), out=errors[j])
            debts[j + 1 :] += error * rows[j, j + 1 :]
            local.codes[j] = code
        codes[:, :, start:stop] = local.codes.permute(1, 2, 0)
        owed[:, :, stop:] += errors.permute(1, 2, 0).contiguous() @ root[:, start:stop, stop:]
    return codes


def sweep(problem: Quadratic, grid: CodeGrid, codes: Tensor) -> int:
    """Move each column of `codes` in place to its best value given all others, once; return how many codes
    moved.
    """
    gradient = problem.gradient(grid.decode(codes))
    moved = 0
    for start in range(0, codes.shape[2], BLOCK):
        stop = min(start + BLOCK, codes.shape[2])
        inner, local, slopes = (
            problem.hessian[:, start:stop, start:stop],
            _Columns(grid, start, stop),
            _columns_first(gradient[:, :, start:stop]),
        )
        before, rows = _columns_first(codes[:, :, start:stop]), inner.permute(1, 2, 0)[..., None].contiguous()
        integers, shifts = grid.format.integers(before, local.zero_point), torch.empty_like(slopes)
        values = integers * local.scale
        for j, slope in enumerate(slopes):
            code = local.nearest(j, values[j] - slope / rows[j, j])
            now = grid.format.integers(code, local.zero_point[j])
            shift = torch.sub(now, integers[j], out=shifts[j]).mul_(local.scale[j])
            slopes[j + 1 :] += shift * rows[j, j + 1 :]
            local.codes[j] = code
        codes[:, :, start:stop] = local.codes.permute(1, 2, 0)
        gradient += shifts.permute(1, 2, 0).contiguous() @ problem.hessian[:, start:stop]
        moved += int(torch.count_nonzero(shifts))
    return moved


def refit(problem: Quadratic, grid: CodeGrid, codes: Tensor, segment: Tensor) -> CodeGrid:
    """Return the grid with each row's scale at its optimum for `codes`; `segment` `[n]` numbers the columns
    that share a scale.
    """
    scale = grid.scale.clone()
    for number in segment.unique():
        values = grid.format.integers(codes, grid.zero_point) * scale
        part = torch.where(segment == number, values, 0.0)
        curve = ((part @ problem.hessian) * part).sum(dim=2)
        ratio = 1 - (problem.gradient(values) * part).sum(dim=2) / curve
        # A row of zeros has no scale of its own, and a scale stays positive.
        ratio = torch.where((curve > 0) & (ratio > 0), ratio, torch.ones_like(ratio))
        scale = torch.where(segment == number, scale * ratio[:, :, None], scale)
    return replace(grid, scale=scale)


@torch.no_grad()
def compensate(
    problem: Quadratic, grid: CodeGrid, segment: Tensor, *, sweeps: int, refitted: bool = True
) -> tuple[Tensor, CodeGrid]:
    """Return codes `[G, R, n]` and the grid that they refer to: error feedback, then coordinate descent and,
    where `refitted`, new scales in turns.

    The problem is in float64, which inverting its hessian needs, and the grid in float32. Columns are taken
    in falling order of the hessian's diagonal, and each row's error ends no larger than that of its nearest
    codes.
    """
    order = problem.hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
    back = order.argsort(dim=1)
    ordered, fitted = problem.ordered(order), grid.ordered(order)
    segments = segment.expand_as(order).gather(1, order)[:, None, :]
    codes = feedback(ordered, fitted)
    problem, ordered = problem.to(torch.float32), ordered.to(torch.float32)
    for _ in range(sweeps):
        enough = sweep(ordered, fitted, codes) < WORTHWHILE * codes.numel()
        fitted = refit(ordered, fitted, codes, segments) if refitted else fitted
        if enough:
            break
    codes, fitted = in_order(codes, back), fitted.ordered(back)
    nearest = grid.nearest(problem.target)
    worse = (problem.error(fitted.decode(codes)) > problem.error(grid.decode(nearest)))[:, :, None]
    return torch.where(worse, nearest, codes), replace(
        grid, scale=torch.where(worse, grid.scale, fitted.scale)
    )
