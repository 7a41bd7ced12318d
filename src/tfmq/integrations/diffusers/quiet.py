"""Silence what diffusers and transformers print while they load: bars of their own, and notes on settings
that tfmq chose.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType


def _hush(logging: ModuleType, stack: ExitStack) -> None:
    """Lower one library's voice until the stack unwinds."""
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    logging.set_verbosity_error()
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        stack.callback(logging.enable_progress_bar)


@contextmanager
def quiet() -> Iterator[None]:
    """Let both libraries report errors only, without bars, while the context is open; neither need be
    installed.
    """
    with ExitStack() as stack:
        for library in ("diffusers", "transformers"):
            if find_spec(library) is not None:
                _hush(import_module(f"{library}.utils.logging"), stack)
        yield
