"""Errors that any part of the package may raise, values as messages show them, and the one way to ask for an
optional dependency.
"""

import importlib
import reprlib
from types import ModuleType
from typing import Any

# Most characters of a value that a message shows.
LONGEST = 200
# Bits. Larger integers are not printed: nobody reads them, and Python refuses more than 4300 digits.
WIDEST = 256


class MissingExtraError(ImportError):
    """An optional dependency is not installed; names the extra that brings it."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"this needs {module.partition('.')[0]}; install it with: pip install 'tfmq[{extra}]'"
        ) from error


class _Shown(reprlib.Repr):
    """A few elements of a few levels, each cut: the cost does not depend on how much a value holds."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6
        self.maxstring = self.maxother = 80

    def repr_int(self, value: int, level: int) -> str:
        """Return an integer, or how long it is."""
        return repr(value) if value.bit_length() <= WIDEST else f"<an integer of {value.bit_length()} bits>"


def shown(value: Any) -> str:
    """Return `value` as a message shows it: its repr, cut to at most `LONGEST` characters.

    Files of strangers hold values of any size, and values that hold each other many times over.

    >>> shown(4), shown("x" * 1000)[:8], len(shown([["x" * 1000] * 1000] * 1000)) <= LONGEST
    ('4', "'xxxxxxx", True)
    """
    return cut(_Shown().repr(value), LONGEST)


def cut(text: str, length: int) -> str:
    """Return the first `length` characters of a text, the last three of them dots where there are more."""
    return text if len(text) <= length else text[: length - 3] + "..."
