"""How long calls take."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")

# Least seconds for which a call is repeated: less says little on a machine that is busy with other things.
LOOKED = 0.25
# Seconds. A first call that took longer is not repeated: it overestimates later calls a little, and that is
# good enough.
PATIENCE = 3.0

# Returns the seconds so far. Tests put a clock of their own in its place.
clock = time.perf_counter


class Repeats(NamedTuple):
    """A number of calls in a row, and the seconds that all of them took."""

    calls: int
    seconds: float


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return the result of a call, and the seconds that it takes."""
    began = clock()
    result = call()
    return result, clock() - began


def call_seconds(call: Callable[[], Any]) -> float:
    """Return the seconds that a call takes. Letting go of its result, which frees memory, is part of them."""

    def run() -> None:
        call()

    return timed(run)[1]


def repeated(call: Callable[[], Any], *, seconds: float) -> Repeats:
    """Repeat a call for at least `seconds`, and once at least."""
    began, calls, elapsed = clock(), 0, 0.0
    while not calls or elapsed < seconds:
        call()
        calls += 1
        elapsed = clock() - began
    return Repeats(calls, elapsed)


def seconds_of(call: Callable[[], Any]) -> float:
    """Return what a call takes on average, after a first one that prepares kernels and memory."""
    first = call_seconds(call)
    if first > PATIENCE:
        return first
    repeats = repeated(call, seconds=LOOKED)
    return repeats.seconds / repeats.calls
