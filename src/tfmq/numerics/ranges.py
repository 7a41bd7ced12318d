"""Scale and zero-point from a range or from values."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq.numerics.binary import mean_magnitude
from tfmq.numerics.grids import SMALLEST_SCALE, Grid, IntegerFormat

# Number of values that are searched at once. These and what is computed of them stay in a processor's cache.
CHUNK = 2**17
# A search adds up errors to this power, as BRECQ and Q-Diffusion do.
POWER = 2.4


def from_range(low: Tensor, high: Tensor, fmt: Grid) -> tuple[Tensor, Tensor]:
    """Return `(scale, zero_point)` of the grid that covers `[low, high]` and real zero.

    Shapes: all of the shape of `low`. The zero-point is an integer in float. Symmetric grids cover
    `max(|low|, |high|)`.
    """
    return fmt.cover(low.clamp(max=0.0), high.clamp(min=0.0))


def min_max(values: Tensor, fmt: Grid) -> tuple[Tensor, Tensor]:
    """Return `(scale, zero_point)`, each `[rows]`, that cover every value of `values` `[rows, n]`."""
    return from_range(values.amin(dim=1), values.amax(dim=1), fmt)


def power_(values: Tensor, exponent: float) -> Tensor:
    """Raise values that are not negative to a power, in place, by a logarithm: faster than `pow_`."""
    return values.log2_().mul_(exponent).exp2_()


def search(
    values: Tensor,
    fmt: Grid,
    *,
    low: Tensor | None = None,
    high: Tensor | None = None,
    shrinks: int = 80,
    power: float = POWER,
) -> tuple[Tensor, Tensor]:
    """Return the `(scale, zero_point)` `[rows]` that minimise `sum |x - x_hat|**power` over ranges shrunk
    towards zero.

    The candidates are `shrinks` factors from 1 downwards in steps of `1 / (1.25 * shrinks)` applied to the
    range `[low, high]` `[rows]` (that of `values` `[rows, n]` by default). BRECQ (Li et al., 2021) and
    Q-Diffusion use 80 factors and power 2.4. Two levels have their scale of least squares in closed form.
    """
    if fmt.levels == 2:
        scale = mean_magnitude(values)
        return from_range(-scale, scale, fmt)
    low = values.amin(dim=1) if low is None else low
    high = values.amax(dim=1) if high is None else high
    rows = max(1, CHUNK // max(1, values.shape[1]))
    parts = zip(values.split(rows), low.split(rows), high.split(rows), strict=True)
    found = [_search(*part, fmt, shrinks=shrinks, power=power) for part in parts]
    scale, zero_point = (torch.cat(column) for column in zip(*found, strict=True))
    return scale, zero_point


def _search(
    values: Tensor, low: Tensor, high: Tensor, fmt: Grid, *, shrinks: int, power: float
) -> tuple[Tensor, Tensor]:
    # Make all candidates at once: for a small tensor each operation takes longer than its arithmetic.
    factors = [1.0 - k / (1.25 * shrinks) for k in range(shrinks)]
    scales, zeros = from_range(
        torch.stack([low * factor for factor in factors]),
        torch.stack([high * factor for factor in factors]),
        fmt,
    )
    errors = torch.empty_like(scales)
    # One buffer for all candidates: allocating memory for each would take longer than the arithmetic.
    error_of = torch.empty_like(values)
    columns = (part[:, :, None].unbind() for part in (scales.reciprocal(), scales, zeros))
    for k, (inverse, scale, zero) in enumerate(zip(*columns, strict=True)):
        torch.mul(values, inverse, out=error_of)
        fmt.snap_(error_of, zero).mul_(scale)
        torch.mean(power_(error_of.sub_(values).abs_(), power), dim=1, out=errors[k])
    # Take the first of the least errors. An error that is no number never wins.
    best = errors.nan_to_num(nan=torch.inf, posinf=torch.inf).argmin(dim=0, keepdim=True)
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def share_zero_point(
    scale: Tensor, zero_point: Tensor, fmt: IntegerFormat, *, allowed: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Return grids `(scale, zero_point)` `[S]` with one zero-point that cover what the given ones do, at the
    least cost in resolution.

    Row `t` covers `[-z_t s_t, (L - 1 - z_t) s_t]`. Around another zero-point `z` that takes the scale

        s_t(z) = max(z_t s_t / z, (L - 1 - z_t) s_t / (L - 1 - z))

    with 0 / 0 = 0, and the rounding error of the row grows by `(s_t(z) / s_t)**2`. The `z` with the least
    mean of that over rows is taken, the first of equals. Rows that saw nothing but zeros have no say: any
    grid holds zero.

    `allowed` are the codes to choose from, all by default. A symmetric format has its zero-point already.

    Raises:
        ValueError: no allowed zero-point leaves codes on each side where a row has values.
    """
    seen = scale > SMALLEST_SCALE
    if fmt.symmetric:
        return scale, zero_point
    top = fmt.levels - 1
    below, above = zero_point.double()[:, None], top - zero_point.double()[:, None]
    candidates = torch.tensor(allowed or range(fmt.levels), device=scale.device, dtype=torch.float64)
    # A candidate without codes on a side has to grow without bound if the row has values there, and not at
    # all if it has none.
    growth = torch.maximum(
        *(
            (need / room).nan_to_num(nan=0.0)
            for need, room in ((below, candidates), (above, top - candidates))
        )
    )
    cost = growth[seen].square().sum(dim=0)
    best = int(cost.argmin())
    if not bool(cost[best].isfinite()):
        raise ValueError(f"no zero-point of {list(allowed)} has codes on both sides")
    shared = (scale.double() * growth[:, best]).to(scale.dtype)
    return torch.where(seen, shared, scale), torch.full_like(zero_point, float(candidates[best]))
