"""Interleaved rounds with a fake clock: who runs when, what counts, what is dropped."""

from collections.abc import Callable, Sequence

import pytest

from tfmq.evaluation.cost.timing import PATIENCE, TOLERANCE, Slice, interleaved, timed


def nothing(amount: int = 1) -> None:
    return


class Clock:
    """Time that passes only when a step takes some; foreign work passes with it."""

    def __init__(self, *, foreign: float = 0.0) -> None:
        self.now = 0.0
        self.foreign = foreign

    def step(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds

        return run

    def measure(self, seconds: float, *, at_least: float) -> Slice:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("tfmq.stopwatch.clock", lambda: self.now)
            return timed(self.step(seconds), seconds=at_least, busy=lambda: self.now * self.foreign)


def recorded(played: list[str], name: str, slices: Sequence[Slice]) -> Callable[[], Slice]:
    left = iter(slices)

    def turn() -> Slice:
        played.append(name)
        return next(left)

    return turn


def quiet(*seconds: float) -> list[Slice]:
    return [Slice(value, 0.0) for value in seconds]


def test_a_slice_lasts_long_enough_and_gives_the_time_of_one_step() -> None:
    clock = Clock()
    assert clock.measure(0.25, at_least=1.0) == Slice(0.25, 0.0)
    assert clock.now == 1.0
    assert clock.measure(3.0, at_least=1.0) == Slice(3.0, 0.0)
    assert clock.now == 4.0


def test_a_slice_knows_the_share_of_foreign_work() -> None:
    assert Clock(foreign=0.5).measure(0.25, at_least=1.0) == Slice(0.25, 0.5)
    # Counters of processes and of processors tick apart: never below zero.
    assert Clock(foreign=-0.5).measure(0.25, at_least=1.0).foreign == 0


def test_rounds_are_interleaved_and_start_with_another_variant_each() -> None:
    played: list[str] = []
    turns = {name: recorded(played, name, quiet(1, 1, 1, 1)) for name in "abc"}
    interleaved(turns, rounds=4, advance=nothing)
    assert "".join(played) == "abc" + "bca" + "cab" + "abc"


def test_medians_are_over_rounds() -> None:
    played: list[str] = []
    turns = {"a": recorded(played, "a", quiet(1, 9, 2)), "b": recorded(played, "b", quiet(4, 4, 5))}
    found = interleaved(turns, rounds=3, advance=nothing)
    assert (found["a"].seconds, found["b"].seconds) == (2, 4)
    assert found["a"].rounds == 3 and found["a"].dropped == 0 and found["a"].clean


def test_a_contaminated_round_is_dropped_for_all_and_repeated() -> None:
    played: list[str] = []
    slices = [Slice(1, 0), Slice(50, 2 * TOLERANCE), Slice(3, 0), Slice(2, 0)]
    turns = {"a": recorded(played, "a", slices), "b": recorded(played, "b", quiet(5, 70, 7, 6))}
    done: list[int] = []
    found = interleaved(turns, rounds=3, advance=lambda amount=1: done.append(amount))
    assert (found["a"].seconds, found["b"].seconds) == (2, 6)
    assert all(timing.rounds == 3 and timing.dropped == 1 and timing.clean for timing in found.values())
    assert done == [1, 0, 1, 1]


def test_a_machine_that_is_never_quiet_gives_its_least_loaded_rounds_and_says_so() -> None:
    played: list[str] = []
    loads = [0.9, 0.3, 0.8, 0.2, 0.7, 0.6, 0.25, 0.5, 0.4]
    turns = {"a": recorded(played, "a", [Slice(10 * load, load) for load in loads])}
    found = interleaved(turns, rounds=3, advance=nothing)["a"]
    assert len(played) == PATIENCE * 3
    assert (found.seconds, found.rounds, found.dropped, found.clean) == (2.5, 3, 6, False)


def test_no_rounds() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        interleaved({}, rounds=0, advance=nothing)
