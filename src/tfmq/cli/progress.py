"""Progress bars with the time left, on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from tfmq.progress import Advance, Progress

# Seconds between two lines of a long stage where stderr is a file or a pipe.
INTERVAL = 30.0


# Seconds. Work that is estimated to take less begins without a word.
SHORT = 3.0


def foretell(seconds: float, what: str) -> None:
    """Say on stderr about how long work will take, before it begins, unless that is no time at all.

    >>> in_words(200), in_words(40), in_words(8000)
    ('3.3 min', '40 s', '2.2 h')
    """
    if seconds >= SHORT:
        print(f"about {in_words(seconds)}: {what}", file=sys.stderr, flush=True)


def in_words(seconds: float) -> str:
    """Return a time, rounded as an estimate is."""
    for unit, size, most in (("s", 1, 120), ("min", 60, 120), ("h", 3600, 48)):
        if seconds / size < most:
            return f"{seconds / size:.2g} {unit}" if seconds / size < 10 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.3g} days"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def _lines(description: str, total: int) -> Iterator[Advance]:
    """Report in plain lines: now and then while a stage runs, and when it is done."""
    began = said = time.monotonic()
    done = 0

    def advance(amount: int = 1) -> None:
        nonlocal done, said
        done += amount
        now = time.monotonic()
        if now - said >= INTERVAL and 0 < done < total:
            said = now
            left = (now - began) * (total - done) / done
            print(f"{description}: {done}/{total}, {_clock(left)} left", file=sys.stderr, flush=True)

    yield advance
    print(f"{description}: done in {_clock(time.monotonic() - began)}", file=sys.stderr, flush=True)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield what shows progress: bars on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:

        @contextmanager
        def show(description: str, total: int) -> Iterator[Advance]:
            task = bars.add_task(description, total=total)
            yield lambda amount=1: bars.advance(task, amount)
            bars.update(task, completed=total)

        yield show
