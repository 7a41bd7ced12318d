"""A budget of time divided among units: who is solved at all, and how long roundings are learned."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Share of the budget that is kept for the stages after the units.
RESERVE = 0.05
# Factor on predicted seconds until the first finished unit shows how far predictions are off.
CAUTION = 1.5


@dataclass(frozen=True)
class Cost:
    """Predicted seconds of a unit: for its calls and a solution in closed form, and for each step of
    learning.
    """

    base: float
    step: float


@dataclass(frozen=True)
class Grant:
    """What a unit gets: nothing (nearest codes), or a solver with so many steps of learning."""

    solved: bool
    iterations: int


class _Correction:
    """How far predictions are off: the ratio of all seconds that were taken to those that were predicted."""

    def __init__(self) -> None:
        self.predicted = self.taken = 0.0

    @property
    def factor(self) -> float:
        """Return what to multiply predicted seconds by."""
        return CAUTION if self.predicted == 0 else self.taken / self.predicted

    def add(self, predicted: float, taken: float) -> None:
        """Note seconds that were predicted and those that it took."""
        self.predicted += predicted
        self.taken += taken


class Budget:
    """Divides what is left of the time anew before every unit.

    Units are solved as far as the time reaches, in closed form or by `least` steps of learning, those first
    that disturb the output most for their seconds; what then is left goes to the learning of each in
    proportion to its sensitivity. A unit that gets neither keeps its nearest codes and takes no time.

    Args:
        seconds: seconds that the whole job may take.
        elapsed: returns the seconds that the job has taken so far.
        sensitivity: how much each unit disturbs the output, on any scale.
        costs: what each unit is predicted to take.
        least: fewest steps of learning that a unit which is solved gets.
        most: most steps of learning that a unit gets.
    """

    def __init__(
        self,
        seconds: float,
        elapsed: Callable[[], float],
        sensitivity: Mapping[str, float],
        costs: Mapping[str, Cost],
        *,
        least: int = 0,
        most: int,
    ) -> None:
        self.seconds, self.elapsed = seconds * (1 - RESERVE), elapsed
        self.sensitivity, self.costs, self.least, self.most = sensitivity, costs, least, most
        self.base, self.step = _Correction(), _Correction()

    def grant(self, waiting: Sequence[str]) -> Grant:
        """Return what the first of the units `waiting` gets."""
        name, left = waiting[0], self.seconds - self.elapsed()
        step = {unit: self.costs[unit].step * self.step.factor for unit in waiting}
        chosen, solved = (
            set(),
            {unit: self.costs[unit].base * self.base.factor + self.least * step[unit] for unit in waiting},
        )
        for unit in sorted(
            waiting, key=lambda unit: self.sensitivity[unit] / max(solved[unit], 1e-9), reverse=True
        ):
            if solved[unit] <= left:
                chosen.add(unit)
                left -= solved[unit]
        if name not in chosen:
            return Grant(False, 0)
        whole = sum(self.sensitivity[unit] for unit in chosen)
        share = left * (self.sensitivity[name] / whole if whole > 0 else 1 / len(chosen))
        return Grant(True, min(self.most, self.least + int(share / max(step[name], 1e-9))))

    def took(self, name: str, grant: Grant, *, base: float, steps: float, iterations: int) -> None:
        """Note what a unit took: seconds for its calls and closed form, and for the steps of learning that it
        made.
        """
        if grant.solved:
            self.base.add(self.costs[name].base, base)
        if iterations:
            self.step.add(self.costs[name].step * iterations, steps)
