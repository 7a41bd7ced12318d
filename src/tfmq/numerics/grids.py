"""Grids as frozen values: what codes stand for, before a scale."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tfmq.numerics.balanced import balanced
from tfmq.numerics.binary import BINARY

# Fewest and most bits of a code of a uniform grid.
MIN_BITS, MAX_BITS = 2, 8
# Least scale of a fitted grid, so that no division by zero happens where all values are zero.
SMALLEST_SCALE = 1e-8


class Grid(ABC):
    """The values that codes in `[0, levels - 1]` stand for: integers, in units of a scale.

    A real value is `integers(code, zero_point) * scale`. Engines multiply the integers, so that they run any
    grid of weights whose integers are signed bytes.

    Attributes:
        bits: bits of a stored code.
        symmetric: whether real zero has the same code, `middle`, whatever the scale. Else a zero-point, which
            is the code of real zero, is fitted with it.
    """

    bits: int
    symmetric: bool

    @property
    @abstractmethod
    def levels(self) -> int:
        """Number of codes."""

    @property
    @abstractmethod
    def middle(self) -> int:
        """The code of real zero if the grid is symmetric."""

    @abstractmethod
    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return `(scale, zero_point)` that cover `[low, high]`, which holds zero; the zero-point is an
        integer in float.
        """

    @abstractmethod
    def nearest_(self, values: Tensor, zero_point: Tensor | None) -> Tensor:
        """Put the nearest code, in float, in the place of each of `values`, which are in units of the
        scale. None says that the zero-point was added to them before, in which order a tie may fall the
        other way.
        """

    @abstractmethod
    def integers(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return the integers of codes, in the dtype of both; a fractional code stands for what lies between
        the integers beside it.
        """

    @abstractmethod
    def below(self, values: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code below each of `values`, which are in units of the scale, and the share of the way
        to the next code.
        """

    def describe(self) -> dict[str, Any]:
        """Return the grid as docs/format.md has it."""
        return {"bits": self.bits, "symmetric": self.symmetric}

    def snap_(self, values: Tensor, zero_point: Tensor) -> Tensor:
        """Put the nearest integer of the grid in the place of each of `values`, in units of the scale."""
        return values.copy_(self.integers(self.nearest_(values, zero_point), zero_point))


@dataclass(frozen=True)
class IntegerFormat(Grid):
    """A uniform grid of `2**bits` codes, stored unsigned in `[0, levels - 1]`.

    A value is `(code - zero_point) * scale`. `symmetric` fixes the zero-point to the middle code, so that
    `code - zero_point` is a signed `bits`-wide integer; otherwise the zero-point is fitted and lies on the
    grid, which keeps real zero exact.

    Raises:
        ValueError: `bits` outside 2..8.
    """

    bits: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise ValueError(
                f"bits must lie in {MIN_BITS}..{MAX_BITS}, got {self.bits}; use None for full precision"
            )

    @property
    def levels(self) -> int:
        """Return `2**bits`."""
        return 2**self.bits

    @property
    def middle(self) -> int:
        """Return the code in the middle, `2**(bits - 1)`."""
        return 2 ** (self.bits - 1)

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest scale that reaches both ends, and the zero-point."""
        if self.symmetric:
            scale = (torch.maximum(-low, high) / (self.middle - 1)).clamp(min=SMALLEST_SCALE)
            return scale, torch.full_like(scale, self.middle)
        scale = ((high - low) / (self.levels - 1)).clamp(min=SMALLEST_SCALE)
        return scale, torch.round(-low / scale).clamp(0, self.levels - 1)

    def nearest_(self, values: Tensor, zero_point: Tensor | None) -> Tensor:
        """Round to the nearest code that there is."""
        codes = values.round_() if zero_point is None else values.round_().add_(zero_point)
        return codes.clamp_(0, self.levels - 1)

    def integers(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Return the codes less the zero-point."""
        return codes - zero_point

    def below(self, values: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code of the integer below each value, and its fraction."""
        floor = values.floor()
        return floor + zero_point, values - floor

    def snap_(self, values: Tensor, zero_point: Tensor) -> Tensor:
        """Round each value to an integer of the grid, in place."""
        return self.nearest_(values, zero_point).sub_(zero_point)


@dataclass(frozen=True)
class Table(Grid):
    """A grid of listed integers for weights: code `k` stands for `values[k]`, and there is no zero-point.

    Args:
        name: what recipes and files call it.
        values: signed bytes in ascending order, either with zero among them, or two, one on each side of it.

    Raises:
        ValueError: `values` are no such bytes.
    """

    name: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if not is_table(self.values):
            raise ValueError(
                f"the grid {self.name} must have 3 values or more, ascending, zero among them, "
                "or one on either side of zero"
            )
        if not (self.values[0] >= -128 and self.values[-1] <= 127):
            raise ValueError(f"the values of the grid {self.name} must be signed bytes")

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Return the bits that number the values of the table."""
        return (len(self.values) - 1).bit_length()

    @property
    def symmetric(self) -> bool:  # type: ignore[override]
        """Return True: zero is where it is in the table."""
        return True

    @property
    def levels(self) -> int:
        """Return how many values the table has."""
        return len(self.values)

    @property
    def middle(self) -> int:
        """Return 0: codes are looked up as they are."""
        return 0

    @cached_property
    def _midpoints(self) -> Tensor:
        values = self._table(torch.empty(0))
        return (values[1:] + values[:-1]) / 2

    def _table(self, like: Tensor) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float32, device=like.device)

    def cover(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the smallest scale by which the table reaches both ends, and the code of zero."""
        sides = [extreme / end for extreme, end in ((low, self.values[0]), (high, self.values[-1])) if end]
        scale = torch.stack(sides).amax(dim=0).clamp(min=SMALLEST_SCALE)
        return scale, torch.full_like(scale, self.middle)

    def nearest_(self, values: Tensor, zero_point: Tensor | None) -> Tensor:
        """Put the code of the nearest value of the table in the place of each of `values`."""
        return values.copy_(torch.bucketize(values.contiguous(), self._midpoints.to(values.device)))

    def integers(self, codes: Tensor, zero_point: Tensor) -> Tensor:
        """Look codes up in the table; go straight from value to value in between."""
        table = self._table(codes).to(codes.dtype)
        if not codes.is_floating_point():
            return table[codes.int()]
        first = codes.detach().floor().clamp(0, self.levels - 2)
        start, stop = table[first.long()], table[first.long() + 1]
        return start + (codes - first) * (stop - start)

    def below(self, values: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Return the code of the value below each of `values`, and the share of the way to the next value."""
        table = self._table(values)
        code = (torch.bucketize(values.contiguous(), table, right=True) - 1).clamp(0, self.levels - 2)
        start, stop = table[code], table[code + 1]
        return code.to(values.dtype), (values - start) / (stop - start)

    def describe(self) -> dict[str, Any]:
        """Return the grid with its name and values, so that whoever reads it needs no table."""
        return {**super().describe(), "grid": self.name, "values": list(self.values)}


def is_table(values: Sequence[int]) -> bool:
    """Whether there can be a table of these values: they ascend, and zero is one of them, or two lie on
    either side of it.
    """
    ascending = all(a < b for a, b in pairwise(values))
    around = len(values) == 2 and values[0] < 0 < values[1]
    return ascending and (around or (len(values) >= 3 and 0 in values))


def minifloat(exponent: int, mantissa: int) -> tuple[int, ...]:
    """Return the values of a float of one sign, `exponent` and `mantissa` bits, in units of the smallest one;
    no code stands for infinity, NaN or a second zero.
    """
    ones = range(2**mantissa)
    positive = [*ones] + [(2**mantissa + m) << (e - 1) for e in range(1, 2**exponent) for m in ones]
    return (*(-value for value in reversed(positive[1:])), *positive)


# Values of the grids that a recipe may name in the place of the uniform one (`weights.grid`): floats of 4 and
# 6 bits, as in FP4DiT (Chen et al., 2025), of which those of `e1m2` are evenly spaced, balanced ones, and the
# two of binary weights.
UNIFORM = "uniform"
GRIDS: dict[str, tuple[int, ...]] = {
    "e1m2": minifloat(1, 2),
    "e2m1": minifloat(2, 1),
    "e3m0": minifloat(3, 0),
    "e2m3": minifloat(2, 3),
    "balanced3": balanced(1),
    "balanced5": balanced(2),
    "balanced9": balanced(3),
    "binary": BINARY,
}


def table(name: str) -> Table | None:
    """Return the grid that a recipe calls `name`; None for the uniform one."""
    return None if name == UNIFORM else Table(name, GRIDS[name])
