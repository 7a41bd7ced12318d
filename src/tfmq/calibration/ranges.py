"""What activation quantizers see on a trajectory, and the ranges that follow (finite set calibration; TFMQ-DM
section 4.3).
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.calibration.forward import replaced_forward
from tfmq.calibration.trajectory import CalibrationError
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.scheme import RangeMethod
from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.errors import relative_error
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.ranges import from_range, search, share_zero_point
from tfmq.numerics.segments import split
from tfmq.progress import Advance
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext

# Number of values kept for the range search of one site, over all of its steps and segments.
KEPT = 2**18
# Number of shrunk ranges that the search tries.
SHRINKS = 40
# One grid for all timesteps is accepted if its error is at most this times the error of a grid for each
# timestep: 1 dB. Where the errors of layers add up, the error of the output grows by no more.
TOLERATED = 10**0.1
# Number of values that the range of a timestep has to rest on. A timestep that saw fewer takes in its
# neighbours.
FEWEST_VALUES = 2048
# Share of the trajectory. Neighbours further away are not taken in: their values are of another size.
NEAR = 1 / 8
# Bytes that the kept values of one site and their search take, about.
SITE_BYTES = 4 * KEPT * 2


class NonFiniteError(ValueError):
    """An input holds a NaN or infinite value."""


@dataclass
class SiteStatistics:
    """Exact extremes `[S, G]` of one quantizer's input, evenly spaced values of it for each `(step,
    segment)`, and how many values each step has seen in a segment, on average.
    """

    low: Tensor
    high: Tensor
    values: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)
    seen: Counter[int] = field(default_factory=Counter)

    def update(self, step: int, segment: int, part: Tensor, budget: int) -> None:
        """Add the values `part` seen at `step` in `segment`; at most `budget` of them are kept.

        Raises:
            NonFiniteError: one of them is NaN or infinite.
        """
        flat = part.detach().flatten()
        low, high = (extreme.cpu() for extreme in flat.aminmax())
        # A tensor with a NaN has NaN for both extremes, so the extremes show it without another pass.
        if not (low.isfinite() and high.isfinite()):
            raise NonFiniteError
        self.low[step, segment] = torch.minimum(self.low[step, segment], low)
        self.high[step, segment] = torch.maximum(self.high[step, segment], high)
        self.seen[step] += flat.numel()
        stride = -(-flat.numel() // max(1, budget))
        self.values.setdefault((step, segment), []).append(flat[:: stride | 1].cpu().clone())

    def neighbours(self, fewest: int) -> list[range]:
        """Return the steps around each step, as many on either side as there are, that saw `fewest` values
        together, or else all that are `NEAR`.
        """
        count = len(self.low)
        most = int(NEAR * count)
        total = [0, *itertools.accumulate(self.seen[step] / self.low.shape[1] for step in range(count))]

        def around(step: int) -> range:
            near = range(step, step + 1)
            for reach in range(1, most + 1):
                if total[near.stop] - total[near.start] >= fewest:
                    break
                near = range(max(0, step - reach), min(count, step + reach + 1))
            return near

        return [around(step) for step in range(count)]

    def pooled(self, near: Sequence[range]) -> "SiteStatistics":
        """Return what each step and its neighbours `near` it saw together."""
        low, high = (
            torch.stack([extreme[list(steps)].amin(dim=0) for steps in near])
            for extreme in (self.low, -self.high)
        )
        # Keep at most KEPT values. Where there are fewer, keep all, so that none of the rare ones is lost.
        count = sum(len(part) for parts in self.values.values() for part in parts)
        stride = -(-count * max(map(len, near)) // KEPT)
        values = {
            (step, segment): [
                torch.cat(self.values[other, segment])[::stride]
                for other in steps
                if (other, segment) in self.values
            ]
            for step, steps in enumerate(near)
            for segment in range(self.low.shape[1])
        }
        return SiteStatistics(low, -high, {key: found for key, found in values.items() if found})


def _observe(
    site: SiteStatistics, quantizer: ActivationQuantizer, x: Tensor, steps: StepContext, calls: int
) -> None:
    index = steps.index.cpu() if quantizer.per_step else torch.zeros(1, dtype=torch.long)
    parts = split(x, quantizer.segments, axis=quantizer.axis)
    bins = index.unique().tolist()
    rows = index.repeat_interleave(x.shape[0] // len(index)) if len(index) > 1 else index
    for segment, part in enumerate(parts):
        for step in bins:
            chosen = part if len(bins) == 1 else part[rows == step]
            site.update(step, segment, chosen, KEPT // (calls * len(parts) * len(bins)))


@contextmanager
def observed(
    sites: Mapping[str, ActivationQuantizer],
    steps: StepContext,
    calls: int,
    passing: Iterable[ActivationQuantizer] = (),
) -> Iterator[dict[str, SiteStatistics]]:
    """Collect statistics of every quantizer in `sites`; these and the ones `passing` hand their input through
    while the context is open.

    Raises (inside the context):
        CalibrationError: a NaN or infinite input; names the site and the timestep.
    """
    statistics: dict[str, SiteStatistics] = {}

    def watch(name: str, quantizer: ActivationQuantizer) -> Callable[..., Tensor]:
        shape = quantizer.scale.shape
        site = statistics[name] = SiteStatistics(torch.zeros(shape), torch.zeros(shape))

        def forward(x: Tensor) -> Tensor:
            try:
                _observe(site, quantizer, x.float(), steps, calls)
            except NonFiniteError:
                row = int(torch.isfinite(x).flatten(1).all(dim=1).int().argmin())
                timestep = float(steps.timesteps[steps.index[row * len(steps.index) // len(x)]])
                where = f"the input of {name.removesuffix('.input_quantizer')}"
                raise CalibrationError(f"{where} is NaN or infinite at timestep {timestep:g}") from None
            return x

        return forward

    with ExitStack() as stack:
        for name, quantizer in sites.items():
            stack.enter_context(replaced_forward(quantizer, watch(name, quantizer)))
        for quantizer in passing:
            stack.enter_context(replaced_forward(quantizer, lambda x: x))
        yield statistics


@torch.no_grad()
def collect(
    denoiser: Denoiser,
    sites: Mapping[str, ActivationQuantizer],
    steps: StepContext,
    batches: Iterable[Inputs],
    *,
    calls: int,
    advance: Advance,
    passing: Iterable[ActivationQuantizer] = (),
) -> dict[str, SiteStatistics]:
    """Run `denoiser` over `batches`, `calls` of them, and return what every quantizer in `sites` saw; see
    `observed`.
    """
    with observed(sites, steps, calls, passing) as statistics:
        for inputs in batches:
            denoiser(inputs)
            advance()
    return statistics


def _stack(site: SiteStatistics, segment: int) -> Tensor:
    """Return the kept values of a segment as `[S, n]`; steps with fewer values repeat theirs, steps without
    any are zero.
    """
    rows = [
        torch.cat(site.values[step, segment]) if (step, segment) in site.values else torch.zeros(1)
        for step in range(site.low.shape[0])
    ]
    longest = max(len(row) for row in rows)
    return torch.stack([row[torch.arange(longest) % len(row)] for row in rows])


def _at_once(low: Tensor, high: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a segment saw as if it were at one timestep."""
    return low.amin(dim=0, keepdim=True), high.amax(dim=0, keepdim=True), values.reshape(1, -1)


def _error(
    grids: Sequence[tuple[Tensor, Tensor]], seen: Sequence[tuple[Tensor, Tensor, Tensor]], fmt: IntegerFormat
) -> float:
    """Return the energy of what `grids` do to the kept values over the energy of these, a mean over
    timesteps.
    """
    pairs = [
        (values, fake_quantize(values, scale[:, None], zero[:, None], fmt.levels))
        for (scale, zero), (_, _, values) in zip(grids, seen, strict=True)
    ]
    kept, found = (torch.cat(part, dim=1).double() for part in zip(*pairs, strict=True))
    return float(relative_error(kept, found).square().mean())


def fit_site(
    quantizer: ActivationQuantizer,
    site: SiteStatistics,
    *,
    method: RangeMethod,
    shared: Sequence[int] = (),
    measured: bool = False,
    fewest: int = 0,
) -> int:
    """Set the grid of `quantizer` for each step and segment, by exact extremes or by least-error search
    within them.

    With `shared` the grids of a segment get one zero-point, one of these. With `measured` one grid serves all
    steps if it leaves little more error in the kept values, see `TOLERATED`. A step that saw less than
    `fewest` values is taken together with its neighbours; returned is how many steps are, at most.
    """
    near = site.neighbours(fewest)
    together = max(map(len, near))
    if together > 1:
        site = site.pooled(near)

    def fitted(low: Tensor, high: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        grid = (
            from_range(low, high, fmt)
            if method == "min_max"
            else search(values, fmt, low=low, high=high, shrinks=SHRINKS)
        )
        return share_zero_point(*grid, fmt, allowed=shared) if shared else grid

    fmt = quantizer.format
    seen = [
        (site.low[:, segment], site.high[:, segment], _stack(site, segment))
        for segment in range(site.low.shape[1])
    ]
    columns = [fitted(*column) for column in seen]
    if measured:
        static = [fitted(*_at_once(*column)) for column in seen]
        if _error(static, seen, fmt) <= TOLERATED * _error(columns, seen, fmt):
            columns = static
    quantizer.fit(*(torch.stack(column, dim=1) for column in zip(*columns, strict=True)))
    return together
