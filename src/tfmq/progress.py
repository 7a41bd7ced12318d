"""Progress of long work, reported to whoever asked for it, and what a call takes, from which the time of the
work follows.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

# Least seconds of a timing: less says little on a machine that is busy with other things.
LOOKED = 0.25
# Seconds. A first call that took longer is not repeated: it overestimates later calls a little, and that is
# good enough.
PATIENCE = 3.0


class Advance(Protocol):
    """Reports `amount` more units of work done."""

    def __call__(self, amount: int = 1) -> None: ...


class Progress(Protocol):
    """Opens a bar for `total` units of work; what it yields is called as work gets done."""

    def __call__(self, description: str, total: int) -> AbstractContextManager[Advance]: ...


@contextmanager
def silent(description: str, total: int) -> Iterator[Advance]:
    """Report nothing."""

    def advance(amount: int = 1) -> None:
        return

    yield advance


def seconds_of(call: Callable[[], Any]) -> float:
    """Return what a call takes on average, after a first one that prepares kernels and memory."""
    began = time.perf_counter()
    call()
    first = time.perf_counter() - began
    if first > PATIENCE:
        return first
    began, calls = time.perf_counter(), 0
    while calls == 0 or time.perf_counter() - began < LOOKED:
        call()
        calls += 1
    return (time.perf_counter() - began) / calls
