"""Scales of groups of a weight's inputs, in two levels: the step of a group is a whole multiple of the scale
of its row.

    w_hat = ((code - z) m) s

`z` and `m` belong to a group of input channels, `s` to the row. The integers `(code - z) m` are signed bytes,
so that an engine multiplies them as those of any other weight: groups take it no partial sums, and no time
(as in QServe, Lin et al., 2024, section 4.1). Steps of their own, as Q-DiT (Chen et al., 2024) has them,
would take a product of matrices for each group. The price is a step that is rounded to a multiple, of up to
16 at 4 bits; the codes are fitted to the step as it is then.
"""

from collections.abc import Sequence
from functools import cache
from math import gcd

import torch
from torch import Tensor

from tfmq.numerics.grids import Grid
from tfmq.numerics.ranges import POWER, min_max, power_, search

# Fewest channels of a group: what it stores beside its codes takes more than a bit of each in a smaller one.
SMALLEST = 8
# Multiples that a grid has to leave room for.
FEWEST = 4
# Least and largest value of a signed byte.
LOWEST, HIGHEST = -128, 127


def group_size(widths: Sequence[int], most: int) -> int:
    """Return the channels of the largest groups, of at most `most`, that segments of these widths divide
    into; 0 where there are none, or where a segment is one group.

    >>> group_size([1152], 128), group_size([320], 128), group_size([64, 96], 64), group_size([64], 128)
    (128, 80, 32, 0)
    """
    whole = gcd(*widths)
    sizes = (size for size in range(min(most, whole), SMALLEST - 1, -1) if whole % size == 0)
    size = next(sizes, 0)
    return 0 if all(width == size for width in widths) else size


def group_widths(widths: Sequence[int], most: int) -> tuple[int, ...]:
    """Return the widths of segments cut into groups of at most `most` channels, one after the other; those
    that were there where they do not divide into any.

    >>> group_widths([256], 128), group_widths([320, 640], 160), group_widths([7], 128)
    ((128, 128), (160, 160, 160, 160, 160, 160), (7,))
    """
    size = group_size(widths, most)
    return (size,) * (sum(widths) // size) if size else tuple(widths)


def ends(fmt: Grid, zero_point: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest integer of a grid around each zero-point."""
    first, last = torch.zeros_like(zero_point), torch.full_like(zero_point, fmt.levels - 1)
    return fmt.integers(first, zero_point), fmt.integers(last, zero_point)


def largest(fmt: Grid, zero_point: Tensor) -> Tensor:
    """Return the largest multiple by which all integers of a grid stay signed bytes, for each zero-point."""
    low, high = ends(fmt, zero_point)
    return torch.minimum(LOWEST / low.clamp(max=-1), HIGHEST / high.clamp(min=1)).floor()


@cache
def has_room(fmt: Grid) -> bool:
    """Whether a grid leaves room for `FEWEST` multiples, whatever its zero-point: uniform ones of up to five
    bits, six if they are symmetric, and tables of small integers.
    """
    zeros = torch.tensor([float(fmt.middle)] if fmt.symmetric else [0.0, fmt.levels - 1.0])
    return int(largest(fmt, zeros).min()) >= FEWEST


def spread_groups(values: Tensor, size: int) -> Tensor:
    """Return one value for each channel, of one for each group of `size`, along axis 1."""
    return values.repeat_interleave(size, dim=1)


def fit_groups(
    weight: Tensor, fmt: Grid, size: int, *, segments: Sequence[int], method: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `(scale, zero_point, multiplier)` of a weight `[R, C, ...]` with groups of `size` channels,
    `[R, G]` for G segments, `[R, C / size]` and `[R, C / size]`, integers in float.

    Each group is fitted by itself, as a row without groups is. The scale is the least by which every step can
    be reached; a step becomes the multiple next to it that leaves less error or, on exact ranges
    (`min_max`), the one above, which covers them.
    """
    rows, count = len(weight), weight.shape[1] // size
    values = weight.reshape(rows * count, -1)
    fitted = search(values, fmt) if method == "search" else min_max(values, fmt)
    step, zero_point = (column.reshape(rows, count) for column in fitted)
    most = largest(fmt, zero_point)
    widths = [width // size for width in segments] or [count]
    scale = torch.stack([part.amax(dim=1) for part in (step / most).split(widths, dim=1)], dim=1)
    wide = scale.repeat_interleave(torch.tensor(widths, device=scale.device), dim=1)
    # Where a step is a multiple but for rounding, both candidates are that one.
    below, above = ((step / wide + slack).floor().clamp(min=1) for slack in (1e-4, 1 - 1e-4))
    below, above = torch.minimum(below, most), torch.minimum(above, most)
    if method == "min_max":
        return scale, zero_point, above

    def error(multiple: Tensor) -> Tensor:
        steps, zeros = (multiple * wide).reshape(-1, 1), zero_point.reshape(-1, 1)
        return _error(values, fmt, steps, zeros).reshape(rows, count)

    return scale, zero_point, torch.where(error(below) < error(above), below, above)


def _error(values: Tensor, fmt: Grid, step: Tensor, zero_point: Tensor) -> Tensor:
    """Return what `ranges.search` minimises, of each row of `values`."""
    found = fmt.snap_(values / step, zero_point).mul_(step)
    return power_(found.sub_(values).abs_(), POWER).mean(dim=1)
