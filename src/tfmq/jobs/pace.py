"""Decide how much of its solver each unit gets: all that the recipe says, or what a budget of time leaves
it.
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch

from tfmq.jobs.forecast import unit_costs
from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors
from tfmq.progress import Advance
from tfmq.reconstruction.budget import Budget, Cost, Grant
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.sensitivity import ROWS, output_sensitivity
from tfmq.reconstruction.solvers import SOLVERS
from tfmq.reconstruction.unit import UnitReport

# Learning rate times iterations must be about this for a rounding to flip.
REACH = 4.0
# Fewest steps that a unit gets from a solver which only learns. With fewer steps it would pay for its calls
# and gain next to nothing.
LEAST = 100


class Pace(Protocol):
    """Says what a unit gets before it is reconstructed, and is told what it took.

    `learning` returns the hyper-parameters of the unit with this number, or None where it keeps its nearest
    codes.
    """

    def learning(self, number: int) -> Learning | None:
        """Return the learning of the unit `number`; None where it keeps its nearest codes."""

    def took(self, number: int, report: UnitReport, moments: Sequence[float]) -> None:
        """Hear what a unit took; `moments` are when its solver advanced, in seconds."""


@dataclass(frozen=True)
class Unhurried:
    """Every unit gets what the recipe says."""

    config: Learning

    def learning(self, number: int) -> Learning | None:
        """Return the recipe's learning for every unit."""
        return self.config

    def took(self, number: int, report: UnitReport, moments: Sequence[float]) -> None:
        """Do nothing: what a unit took changes nothing for the next."""


def within(config: Learning, iterations: int) -> Learning:
    """Return the learning of so many steps, at a rate that lets roundings cross over in them."""
    return replace(
        config, iterations=iterations, learning_rate=max(config.learning_rate, REACH / max(1, iterations))
    )


class Paced:
    """A budget's grants, each recorded in the journal before its unit begins: a resumed job goes on with the
    same.
    """

    def __init__(self, budget: Budget, job: Job, work: Work) -> None:
        self.budget, self.job, self.work = budget, job, work
        self.closed_form = SOLVERS[job.recipe.rounding.solver].runs_full
        self.grants: dict[int, Grant] = {}

    def learning(self, number: int) -> Learning | None:
        """Return what the budget grants a unit, from the journal where it was granted before."""
        stage = Kept(f"grant_{number:04d}", partial(self._decided, number), _grant)
        grant = self.grants[number] = stage(self.job, self.work)
        return within(self.job.recipe.learning, grant.iterations) if grant.solved else None

    def _decided(self, number: int, job: Job, work: Work) -> Tensors:
        grant = self.budget.grant([unit.name for unit in work.units[number:]])
        return {"solved": torch.tensor(grant.solved), "iterations": torch.tensor(grant.iterations)}

    def took(self, number: int, report: UnitReport, moments: Sequence[float]) -> None:
        """Tell the budget; `moments` are when the solver advanced: once for each layer in closed form, once
        for each step.
        """
        first = len(self.work.units[number].layers) if self.closed_form else 0
        steps = moments[first : first + report.iterations]
        learned = (steps[-1] - steps[0]) * len(steps) / (len(steps) - 1) if len(steps) > 1 else 0.0
        iterations = report.iterations if learned else 0
        self.budget.took(
            self.work.units[number].name,
            self.grants[number],
            base=report.seconds - learned,
            steps=learned,
            iterations=iterations,
        )


def _grant(job: Job, work: Work, found: Tensors) -> Grant:
    return Grant(bool(found["solved"]), int(found["iterations"]))


class Noted:
    """Passes on how far a solver is, and notes when it said so."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.moments: list[float] = []
        self.amount = 0

    def __call__(self, amount: int = 1) -> None:
        self.moments.append(time.perf_counter())
        self.amount += amount
        self.advance(amount)


def paced(job: Job, work: Work) -> Pace:
    """Return how much each unit gets: all that the recipe says or, where the job has a budget of time, a
    share of it by what is measured first.
    """
    seconds, recipe = job.resources.time_budget, job.recipe
    if seconds is None:
        return Unhurried(recipe.learning)
    if job.elapsed() > seconds:
        text = (
            f"the time budget of {seconds:.0f} s is gone after {job.elapsed():.0f} "
            "s of calibration: units keep their nearest codes"
        )
        warnings.warn(text + "; raise it, or calibrate on fewer samples or steps", stacklevel=2)
    sensitivity, costs = Kept("sensitivity", partial(_measured, seconds), _by_unit)(job, work)
    solver = SOLVERS[recipe.rounding.solver]
    most = recipe.learning.iterations if solver.work(recipe.learning, 0) else 0
    least = 0 if solver.runs_full else min(LEAST, most)
    return Paced(Budget(seconds, job.elapsed, sensitivity, costs, least=least, most=most), job, work)


def _by_unit(job: Job, work: Work, measured: Tensors) -> tuple[dict[str, float], dict[str, Cost]]:
    """Return the sensitivity and the cost of each unit by its name."""
    names = [unit.name for unit in work.units]
    costs = (Cost(*row) for row in measured["costs"].tolist())
    return (
        dict(zip(names, measured["sensitivity"].tolist(), strict=True)),
        dict(zip(names, costs, strict=True)),
    )


def _measured(seconds: float, job: Job, work: Work) -> Tensors:
    """Return the sensitivity and the costs of units; zeros where the budget is gone, since measuring would
    only add to it.
    """
    units = work.units
    if job.elapsed() > seconds:
        return {
            "sensitivity": torch.zeros(len(units), dtype=torch.float64),
            "costs": torch.zeros(len(units), 2, dtype=torch.float64),
        }
    denoiser, store = job.denoiser, job.store
    device = next(denoiser.module.parameters()).device
    # One call is from the noisier half of the schedule, the other from the cleaner half.
    calls = [
        store.read(len(store) * part // 4).rows(0, ROWS).map(lambda tensor: tensor.to(device))
        for part in (1, 3)
    ]
    rows = torch.tensor([[cost.base, cost.step] for cost in unit_costs(job, units)], dtype=torch.float64)
    return {"sensitivity": output_sensitivity(denoiser, units, calls), "costs": rows.reshape(-1, 2)}
