"""A process that computes what it is told, one call after the other, and ends when it is told or when its
parent does.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context, parent_process, resource_tracker
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

# Seconds to wait for a process to end: Python hears of a signal only when an operation of torch has ended.
PATIENCE = 5.0


class WorkerEndedError(RuntimeError):
    """The process is gone, and did not answer."""


class Worker:
    """Runs functions in a process of its own. Ctrl-C is for the parent, which ends it: half a computation has
    nothing to say.

    Not a pool of the standard library: that waits for what is being computed, which may take minutes, before
    it ends.
    """

    def __init__(self) -> None:
        context = get_context("spawn")
        self._calls, other = context.Pipe()
        self._process = context.Process(target=_answer, args=(other,))
        with _interrupts_held():
            self._process.start()
        # Close this end: only then does the other end report that the process died.
        other.close()

    @property
    def process_id(self) -> int:
        """The number of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `function`, one at the top of a module, returns there, or raise what it raises.

        Raises:
            WorkerEndedError: the process ended before it answered.
        """
        try:
            self._calls.send((function, arguments))
            returned, value = self._calls.recv()
        except (EOFError, OSError) as error:
            raise WorkerEndedError("the process ended before it answered") from error
        if not returned:
            raise value
        return value

    def end(self) -> None:
        """End the process: by its own hand, so that it leaves no semaphores behind, and by ours where it
        takes longer than `PATIENCE`.
        """
        self._process.terminate()
        self._process.join(PATIENCE)
        self._process.kill()
        self._process.join()
        self._calls.close()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a process that is started in the block hold back Ctrl-C from its first moment: it would print a
    traceback while it imports.
    """
    if os.name == "nt":
        yield
        return
    # It is started on demand otherwise, and then lets signals through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _answer(calls: Connection) -> None:
    """Answer calls until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _end_with_parent()
    while True:
        try:
            function, arguments = calls.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except Exception as error:  # Whatever it is, the parent is told.
            answer = False, error
        calls.send(answer)


def _end_with_parent() -> None:
    """Let this process end when the page's does, however that ends: it would go on holding a model."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()
