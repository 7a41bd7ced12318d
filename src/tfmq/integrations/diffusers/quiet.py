"""Silence what diffusers and transformers print while they load: bars of their own, and notes on settings that tfmq chose."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def _hush(logging: ModuleType, stack: ExitStack) -> None:
    """Lower one library's voice until the stack unwinds."""
    stack.callback(logging.set_verbosity, logging.get_verbosity())
    logging.set_verbosity_error()
    if logging.is_progress_bar_enabled():
        logging.disable_progress_bar()
        stack.callback(logging.enable_progress_bar)


@contextmanager
def quiet() -> Iterator[None]:
    """Let both libraries report errors only, without bars, while the context is open."""
    with ExitStack() as stack:
        for logging in (diffusers_logging, transformers_logging):
            _hush(logging, stack)
        yield
