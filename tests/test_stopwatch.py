"""What calls take, by a clock that only they advance."""

from collections.abc import Callable

import pytest

from tfmq.stopwatch import LOOKED, PATIENCE, Repeats, call_seconds, repeated, seconds_of, timed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    time = [0.0]
    monkeypatch.setattr("tfmq.stopwatch.clock", lambda: time[0])
    return time


def taking(now: list[float], *seconds: float) -> Callable[[], int]:
    """Return a call that takes so many seconds, one after the other and the last of them ever after; it
    returns how often it ran.
    """
    count = 0

    def call() -> int:
        nonlocal count
        now[0] += seconds[min(count, len(seconds) - 1)]
        count += 1
        return count

    return call


def test_a_call_is_timed_with_and_without_its_result(now: list[float]) -> None:
    call = taking(now, 0.5, 2.0)
    assert timed(call) == (1, 0.5)
    assert call_seconds(call) == 2.0


def test_freeing_a_result_counts_where_nobody_wants_the_result(now: list[float]) -> None:
    class Freed:
        def __del__(self) -> None:
            now[0] += 1.0

    assert call_seconds(Freed) == 1.0
    kept, seconds = timed(Freed)
    assert isinstance(kept, Freed) and seconds == 0.0


@pytest.mark.parametrize(("each", "calls"), [(0.25, 4), (3.0, 1)])
def test_a_call_is_repeated_for_long_enough_and_once_at_least(
    now: list[float], each: float, calls: int
) -> None:
    assert repeated(taking(now, each), seconds=1.0) == Repeats(calls, calls * each)
    assert repeated(taking(now, each), seconds=0.0) == Repeats(1, each)


def test_the_first_call_counts_only_where_it_is_too_long_to_repeat(now: list[float]) -> None:
    quick = taking(now, PATIENCE, LOOKED / 4)
    assert seconds_of(quick) == LOOKED / 4
    assert quick() == 1 + 4 + 1
    slow = taking(now, 2 * PATIENCE, 1.0)
    assert seconds_of(slow) == 2 * PATIENCE
    assert slow() == 2
