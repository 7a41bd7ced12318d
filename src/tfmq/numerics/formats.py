"""Integer grids as frozen values."""

from dataclasses import dataclass

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class IntegerFormat:
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
        """Number of codes."""
        return 2**self.bits

    @property
    def middle(self) -> int:
        """The zero-point of the symmetric grid."""
        return 2 ** (self.bits - 1)
