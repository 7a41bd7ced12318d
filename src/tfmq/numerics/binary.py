"""Binary weights, `-s` and `s`: a bit each, and a scale in closed form (BinaryDM, Zheng et al., 2025)."""

from torch import Tensor

# The values of the two codes. No code stands for real zero.
BINARY = (-1, 1)


def mean_magnitude(values: Tensor) -> Tensor:
    """Return the scale `[rows]` that minimises `sum (x - s sign(x))**2` of `values` `[rows, n]`: the mean of
    `|x|`.
    """
    return values.abs().mean(dim=1)
