"""Progress of long work, reported to whoever asked for it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


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
