"""Choose whether a layer has a low-rank branch beside its codes, and of which factors: splitters propose, and
the error of the layer's output on inputs that the factors were not fitted to decides.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.calibration.rescaling import Reader, Seen, entering, price_of, proposed
from tfmq.nn.branch import BranchType, SideBranch
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.transform import Transform
from tfmq.numerics.low_rank import SPLITTERS, LowRank, second_moments

# Rows of a layer's inputs that are kept at most: one half of them fits, the other one decides.
ROWS = 1024
# Share of the error that a branch has to take away, 0.5 dB: it has products of its own at every call.
WORTH = 0.1


@dataclass(frozen=True)
class Split:
    """What becomes of a layer: a transform of its input, and factors beside its codes, None for no branch."""

    transform: Transform = field(default_factory=Transform)
    factors: LowRank | None = None


def branch_of(
    layer: CalibratedLayer, factors: LowRank, dtype: BranchType, segments: tuple[int, ...] = ()
) -> SideBranch:
    """Return the branch of some factors beside a layer, whose input has other `segments` if any are given."""
    branch = SideBranch(
        layer.operation,
        tuple(layer.weight.shape),
        factors.down.shape[1],
        dtype=dtype,
        segments=segments or layer.grid.segments,
    )
    branch.fill(factors)
    return branch


def pays(layer: CalibratedLayer, rank: int) -> bool:
    """Whether a branch of `rank` has fewer values than the weight that it stands beside."""
    rows, columns = len(layer.weight) // layer.operation.groups, layer.weight[0].numel()
    return 0 < rank * (rows + columns) < rows * columns


def halves(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return which rows of some calls `[G, P, n]` fit, and which decide: those of every other call, or of one
    call the halves.
    """
    number = torch.arange(len(rows)).repeat_interleave(torch.tensor([part.shape[1] for part in rows]))
    if len(rows) == 1:
        number = (torch.arange(len(number)) * 2 >= len(number)).long()
    even = number % 2 == 0
    return even.nonzero()[:, 0], (~even).nonzero()[:, 0]


class _Trial:
    """A layer under a transform of its input."""

    def __init__(self, layer: CalibratedLayer, seen: Seen, transform: Transform, ranges: str) -> None:
        self.layer, self.ranges, self.segments = layer, ranges, transform.segments
        self.price = price_of(transform)
        self.fitting, self.deciding = halves(seen.rows)
        self.weight, self.read, self.entered = entering(layer, seen, transform)
        self.exact = self.read[:, self.deciding] @ self.matrix(self.weight).mT

    def matrix(self, weight: Tensor) -> Tensor:
        """Return rows of a weight as `[G, R, n]`."""
        return weight.flatten(1).unflatten(0, (self.layer.operation.groups, -1))

    def rounded(self, matrix: Tensor) -> Tensor:
        """Return the values of the nearest codes of a weight `[G, R, n]`."""
        weight = matrix.flatten(0, 1).reshape(self.weight.shape)
        grid = self.layer.grid.refitted(weight, method=self.ranges, segments=self.segments)
        return self.matrix(grid.decode(grid.encode(weight)))

    def error(self, branch: SideBranch | None) -> float:
        """Return the squared error of the output, on the rows that decide, times the transform's price."""
        entered, weight = self.entered[:, self.deciding], self.matrix(self.weight)
        if branch is None:
            output = entered @ self.rounded(weight).mT
        else:
            product = self.matrix(branch.product())
            read = entered if branch.shared else self.read[:, self.deciding]
            output = entered @ self.rounded(weight - product).mT + read @ product.mT
        return float((output - self.exact).double().square().sum()) * self.price

    def factors(self, rank: int, splitters: Iterable[str]) -> Iterator[LowRank]:
        """Yield what splitters propose, from the rows that fit."""
        weight, moments = self.matrix(self.weight), second_moments(self.read[:, self.fitting])
        for name in splitters:
            yield from SPLITTERS[name](weight, moments, rank, self.rounded)


@torch.no_grad()
def best_split(
    reader: Reader,
    *,
    equalizers: Iterable[str],
    splitters: Iterable[str],
    rank: int,
    dtype: BranchType,
    clusters: int = 0,
) -> Split | None:
    """Return the transform and the factors that leave the least error together; None where no branch takes
    away `WORTH` of what the best transform alone leaves.
    """
    layer, seen, ranges = reader
    if not pays(layer, rank):
        return None
    alone, least, kept = torch.inf, torch.inf, None
    for transform in (Transform(), *proposed([reader], equalizers, clusters)):
        trial = _Trial(layer, seen, transform, ranges)
        alone = min(alone, trial.error(None))
        for factors in trial.factors(rank, splitters):
            error = trial.error(branch_of(layer, factors, dtype, transform.segments))
            if error < least:
                least, kept = error, Split(transform, factors)
    return kept if least < (1 - WORTH) * alone else None
