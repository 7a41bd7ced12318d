import random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfmq.reconstruction.budget import Budget, Cost, Grant

NAMES = [f"u{i}" for i in range(20)]


class Job:
    """Units that take `off` times what is predicted, each by its own luck."""

    def __init__(
        self,
        seconds: float,
        *,
        off: float = 1.0,
        before: float = 0.0,
        least: int = 0,
        most: int = 20_000,
        seed: int = 0,
        step: float = 0.01,
    ) -> None:
        draw = random.Random(seed)
        self.now, self.off, self.draw = before, off, draw
        self.sensitivity = {name: draw.uniform(0, 1) ** 3 for name in NAMES}
        self.costs = {name: Cost(draw.uniform(0.5, 2), step * draw.uniform(0.5, 2)) for name in NAMES}
        self.budget = Budget(seconds, lambda: self.now, self.sensitivity, self.costs, least=least, most=most)

    def run(self) -> dict[str, Grant]:
        grants = {}
        for number, name in enumerate(NAMES):
            grant = grants[name] = self.budget.grant(NAMES[number:])
            luck = self.off * self.draw.uniform(0.8, 1.25)
            base = luck * self.costs[name].base if grant.solved else 0.0
            steps = luck * self.costs[name].step * grant.iterations
            self.now += base + steps
            self.budget.took(name, grant, base=base, steps=steps, iterations=grant.iterations)
        return grants


@given(
    seconds=st.floats(20, 2000),
    off=st.floats(0.3, 2.0),
    seed=st.integers(0, 50),
    before=st.floats(0, 0.5),
    least=st.sampled_from([0, 100]),
)
def test_a_job_ends_within_a_tenth_of_its_budget(
    seconds: float, off: float, seed: int, before: float, least: int
) -> None:
    job = Job(seconds, off=off, seed=seed, before=before * seconds, least=least)
    job.run()
    assert job.now <= 1.1 * seconds


def test_what_is_left_goes_to_learning_by_sensitivity() -> None:
    job = Job(500)
    grants = job.run()
    assert all(grant.solved for grant in grants.values()) and job.now > 400, "and nearly all of it is used"
    seconds = {name: grants[name].iterations * job.costs[name].step for name in NAMES}
    ranked = sorted(NAMES, key=lambda name: job.sensitivity[name])
    assert sum(seconds[name] for name in ranked[:10]) < 0.25 * sum(seconds[name] for name in ranked[10:])


def test_where_time_is_short_the_most_sensitive_for_their_seconds_are_solved() -> None:
    job = Job(12)
    grants = job.run()
    worth = {
        solved: [job.sensitivity[n] / job.costs[n].base for n in NAMES if grants[n].solved == solved]
        for solved in (True, False)
    }
    assert 2 <= len(worth[True]) <= 12 and mean(worth[True]) > 4 * mean(worth[False])


def test_no_unit_is_run_for_fewer_steps_than_are_worth_it() -> None:
    bare, worth = Job(40).run(), Job(40, least=100).run()
    assert 0 < min(grant.iterations for grant in bare.values() if grant.solved) < 100, (
        "without, units get what is left"
    )
    taken = [grant.iterations for grant in worth.values() if grant.solved]
    assert 2 <= len(taken) < len(NAMES) and min(taken) >= 100


@pytest.mark.parametrize(("seconds", "most"), [(1e9, 400), (1e9, 0)])
def test_no_unit_learns_longer_than_the_recipe_says(seconds: float, most: int) -> None:
    assert {grant.iterations for grant in Job(seconds, most=most).run().values()} == {most}


def test_a_budget_that_is_gone_leaves_nearest_codes() -> None:
    assert set(Job(10, before=30).run().values()) == {Grant(False, 0)}


def test_units_that_disturb_nothing_share_alike() -> None:
    budget = Budget(
        100, lambda: 0.0, dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, Cost(0.1, 0.01)), most=10_000
    )
    assert budget.grant(NAMES).iterations == pytest.approx((95 - 20 * 0.15) / 20 / 0.015, abs=1)
