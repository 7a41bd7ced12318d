"""Balanced grids of `2**n + 1` evenly spaced levels (BitsFusion, Sui et al., 2024): as many below zero as
above it, which a uniform grid of `2**n` codes has not.
"""


def balanced(n: int) -> tuple[int, ...]:
    """Return the integers from `-2**(n - 1)` to `2**(n - 1)`. A code of theirs is stored in `n + 1` bits: two
    for the three levels of `n = 1`, where a denser packing would take 1.6.

    >>> balanced(1), balanced(2)
    ((-1, 0, 1), (-2, -1, 0, 1, 2))
    """
    end = 2 ** (n - 1)
    return tuple(range(-end, end + 1))
