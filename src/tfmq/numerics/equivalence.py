"""Rescaled inputs of a layer, and the factors that equalizers propose for them.

`x W^T = (x f) (W / f)^T` for any factor `f` of each input channel. Where a channel is far larger than the
others, a factor below one takes its range from the input and gives it to the weight, which has a grid for
each row. Factors are powers of two, so that the product stays the same to the bit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of the difficulty that SmoothQuant's grid moves from the input to the weight.
SHARES = (0.25, 0.5, 0.75, 1.0)
# The largest factor that a peak is divided by, as TCAQ-DM bounds it.
MOST = 100.0
# Magnitudes below this share of the largest channel's are taken for it: a channel that is always zero has
# none.
LEAST = 1e-4


@dataclass(frozen=True)
class Extremes:
    """Least and greatest value of each channel of an input, `[S, C]` each, by timestep."""

    low: Tensor
    high: Tensor

    @property
    def magnitude(self) -> Tensor:
        """Return the largest magnitudes `[S, C]`, none of them zero."""
        found = torch.maximum(-self.low, self.high)
        return found.clamp(min=max(float(found.max()) * LEAST, torch.finfo(found.dtype).tiny))


def by_row(factor: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Return the factor `[C_in]` so that it broadcasts against rows `[C_out, C_in / groups, ...]` of a weight
    with `groups` groups.
    """
    rows = factor.reshape(groups, -1).repeat_interleave(len(weight) // groups, dim=0)
    return rows.reshape(*rows.shape, *[1] * (weight.ndim - 2))


def power_of_two(factor: Tensor) -> Tensor:
    """Return the nearest powers of two, on a logarithmic scale; multiplying by one of them is exact."""
    return torch.exp2(factor.log2().round())


def columns(weight: Tensor, groups: int) -> Tensor:
    """Return the largest magnitude `[C_in]` of what each input channel is multiplied by, none of them
    zero.
    """
    found = weight.abs().flatten(2).amax(dim=2) if weight.ndim > 2 else weight.abs()
    found = found.unflatten(0, (groups, -1)).amax(dim=1).flatten()
    return found.clamp(min=max(float(found.max()) * LEAST, torch.finfo(found.dtype).tiny))


# Proposes factors `[C_in]` from the input's extremes and the largest weights `[C_in]`; the factor one is
# always a candidate beside them.
Equalizer = Callable[[Extremes, Tensor], Iterator[Tensor]]


def ranges(extremes: Extremes, weights: Tensor) -> Iterator[Tensor]:
    """Yield `w^b / a^s` for the extremes `a` over all timesteps (SmoothQuant; Xiao et al., 2023, eq. 4; over
    timesteps: DiTAS, 2025).

    `b` is `1 - s` and 0, and the geometric mean of the factors is one.
    """
    inputs = extremes.magnitude.amax(dim=0)
    for share in SHARES:
        for other in dict.fromkeys((1 - share, 0.0)):
            found = weights**other / inputs**share
            yield found / found.log().mean().exp()


def peaks(extremes: Extremes, weights: Tensor) -> Iterator[Tensor]:
    """Yield one over how far a channel's peaks stand out, averaged over timesteps by their size (TCAQ-DM;
    Huang et al., 2025, section 3.2).
    """
    magnitude = extremes.magnitude
    ratio = magnitude / magnitude.amin(dim=1, keepdim=True)
    yield 1 / ((ratio * magnitude).sum(dim=0) / magnitude.sum(dim=0)).clamp(1.0, MOST)


EQUALIZERS: dict[str, Equalizer] = {"ranges": ranges, "peaks": peaks}
