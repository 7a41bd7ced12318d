"""Time several ways to do the same, on a machine that others use too."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from tfmq.progress import Advance
from tfmq.stopwatch import repeated

# Share of one processor that foreign work may take from a slice before its round counts as contaminated.
TOLERANCE = 0.1
# If fewer rounds than this are clean, the least loaded others are kept beside them.
MINIMUM = 3
# Number of rounds that are tried for each one that is wanted.
PATIENCE = 3


@dataclass(frozen=True)
class Slice:
    """One variant's turn: seconds a step, and the share of one processor that other processes took
    meanwhile.
    """

    seconds: float
    foreign: float


@dataclass(frozen=True)
class Timing:
    """Median seconds a step over `rounds` rounds, `dropped` ones aside; `clean` if none of the kept ones was
    contaminated.
    """

    seconds: float
    rounds: int
    dropped: int
    clean: bool


def timed(step: Callable[[], object], *, seconds: float, busy: Callable[[], float]) -> Slice:
    """Repeat `step` for at least `seconds`.

    Args:
        step: what is timed.
        seconds: how long at least; the counters behind `busy` have a resolution of some 10 ms.
        busy: processor seconds of other processes so far.
    """
    foreign = busy()
    count, elapsed = repeated(step, seconds=seconds)
    return Slice(elapsed / count, max(0.0, busy() - foreign) / elapsed if elapsed else 0.0)


def _kept(loads: list[float], *, wanted: int) -> list[int]:
    """Return the numbers of the rounds that count: the clean ones, or the least loaded where too few are
    clean.
    """
    clean = [number for number, load in enumerate(loads) if load <= TOLERANCE]
    if len(clean) >= min(MINIMUM, wanted):
        return clean
    return sorted(sorted(range(len(loads)), key=loads.__getitem__)[: min(MINIMUM, wanted)])


def interleaved(
    turns: Mapping[str, Callable[[], Slice]], *, rounds: int, advance: Advance
) -> dict[str, Timing]:
    """Let every variant have its turn in each round, and return the median of each over the same clean
    rounds.

    Each round starts with another variant. A round is contaminated if foreign work fell into any turn of it,
    and is then dropped for all, so that ratios compare what ran under the same conditions. Dropped rounds are
    repeated, up to `PATIENCE` times as many in all.

    Raises:
        ValueError: no round is wanted.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    names = list(turns)
    slices: list[dict[str, Slice]] = []
    loads: list[float] = []
    while sum(load <= TOLERANCE for load in loads) < rounds and len(loads) < PATIENCE * rounds:
        start = len(loads) % max(1, len(names))
        slices.append({name: turns[name]() for name in names[start:] + names[:start]})
        loads.append(max((part.foreign for part in slices[-1].values()), default=0.0))
        advance(int(loads[-1] <= TOLERANCE))
    kept = _kept(loads, wanted=rounds)
    clean = all(loads[number] <= TOLERANCE for number in kept)
    return {
        name: Timing(
            median(slices[number][name].seconds for number in kept), len(kept), len(loads) - len(kept), clean
        )
        for name in names
    }
