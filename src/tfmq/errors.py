"""Errors that any part of the package may raise, and the one way to ask for an optional dependency."""

import importlib
from types import ModuleType


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
        raise MissingExtraError(f"this needs {module.partition('.')[0]}; install it with: pip install 'tfmq[{extra}]'") from error
