"""How a verb ends: its result on stdout, its one line of complaint on stderr, its exit status."""

import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import typer

# Exit codes of the process. A shell gives 130 to what Ctrl-C ended.
FAILED, USAGE, INTERRUPTED = 1, 2, 130
# Most characters of an error message that are printed.
LONGEST = 600
NOTHING = "nothing was written"
# torchvision says this where its compiled part does not load. It is also the cause of what libraries that
# import torchvision say then.
MISFIT_SIGN = "operator torchvision::"
MISFIT = (
    "the torchvision that is installed does not fit this torch: it is of another "
    "version, or of another index (CPU, CUDA). Install one that fits, "
    "the version that belongs to the torch, from where the torch came (pip "
    "install --force-reinstall --no-deps torchvision, with the same "
    "--index-url); or remove it: only inception, precision-recall and lpips of tfmq evaluate need it"
)


def complain(message: str, *, kind: str = "error") -> None:
    """Write one line to stderr."""
    line = " ".join(message.split())
    print(f"{kind}: {line[:LONGEST]}{'...' if len(line) > LONGEST else ''}", file=sys.stderr, flush=True)


def emit(result: Mapping[str, Any]) -> None:
    """Write one JSON object to stdout."""
    sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, what it came from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _cause(error: Exception) -> str:
    """Return what to say about an error: its own words, and its kind where the words alone say little."""
    if any(str(link).startswith(MISFIT_SIGN) for link in _chain(error)):
        return MISFIT
    match error:
        case OSError() if error.strerror:
            return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        case ValueError() | OSError() | RuntimeError() | ImportError() if str(error).strip():
            return str(error)
    return f"unexpected {type(error).__name__}: {error} (TFMQ_DEBUG=1 shows where)"


def _is_ours(filename: str) -> bool:
    """Whether a warning raised in this file is for the user: not one of an installed library about itself."""
    path = Path(filename)
    return "site-packages" not in path.parts or "tfmq" in path.parts


@contextmanager
def _own_warnings() -> Iterator[None]:
    """Show tfmq's warnings as one line each, and nobody else's."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and _is_ours(filename):
            complain(str(message), kind="warning")

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = show
        yield


class _Notes(logging.Handler):
    """Keeps what tfmq logs; shows at once what says that something will take long."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a note for the end, or print it at once where the user waits for it."""
        if getattr(record, "waiting", False):
            complain(record.getMessage(), kind="note")
        else:
            self.kept.append(record.getMessage())


@contextmanager
def _shown_notes() -> Iterator[None]:
    """Show what tfmq has to say that is no warning, such as what was chosen by a measurement; nothing where
    the verb fails, which is one line.
    """
    log, notes = logging.getLogger("tfmq"), _Notes()
    level = log.level
    log.addHandler(notes)
    log.setLevel(logging.INFO)
    try:
        yield
        for line in notes.kept:
            complain(line, kind="note")
    finally:
        log.removeHandler(notes)
        log.setLevel(level)


@contextmanager
def _noted_interrupts() -> Iterator[list[int]]:
    """Yield a list that grows with each Ctrl-C, which raises `KeyboardInterrupt` as ever.

    Extensions in C may answer that exception with one of their own: safetensors, interrupted while it makes a
    tensor, raises `RuntimeError`.
    """
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        signal.default_int_handler(number, frame)

    # Only the main thread may set a handler, and a process that ignores Ctrl-C, such as a job in the
    # background, goes on ignoring it.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield seen
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stamp(job: Path) -> int | None:
    """Return when something in the folder of a job was last made, as opening the job does; None where there
    is none.
    """
    return job.stat().st_mtime_ns if job.exists() else None


def job_hint(job: Path) -> Callable[[], str]:
    """Return what says after Ctrl-C whether `--resume` goes on: only where this run has opened the job that
    lives in the folder `job`.
    """
    before = _stamp(job)

    def hint() -> str:
        now = _stamp(job)
        if now is not None and now != before:
            return f"the same command with --resume continues from {job}"
        return NOTHING if now is None else f"{NOTHING}; an earlier job in {job} is as it was"

    return hint


@contextmanager
def verb(*, interrupted: str | Callable[[], str] = NOTHING) -> Iterator[None]:
    """Run the body of a verb: stdout stays free for its result, libraries are quiet, and an error becomes one
    line and an exit status.

    Every exception ends here, the unforeseen ones too: this is the outermost boundary, and the line on stderr
    is a promise. Set TFMQ_DEBUG=1 to let them pass.

    Args:
        interrupted: what to say after Ctrl-C; a function is asked then.
    """
    debug = os.environ.get("TFMQ_DEBUG", "") not in ("", "0")
    with _noted_interrupts() as interrupts:
        try:
            with redirect_stdout(sys.stderr), _own_warnings(), _shown_notes():
                yield
        except (typer.Exit, typer.BadParameter):
            raise
        except (KeyboardInterrupt, Exception) as error:
            if interrupts or isinstance(error, KeyboardInterrupt):
                complain(f"interrupted; {interrupted if isinstance(interrupted, str) else interrupted()}")
                raise typer.Exit(INTERRUPTED) from None
            if debug:
                raise
            complain(_cause(error))
            raise typer.Exit(FAILED) from None
