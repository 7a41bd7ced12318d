"""Give freed memory back to the system, where the C library would keep it for later (glibc); elsewhere nothing happens."""

import ctypes
import sys
from typing import Any

# Blocks from this size on go back to the system as soon as they are freed.
RETURNED = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def _call(name: str, *arguments: Any) -> None:
    if sys.platform.startswith("linux"):
        library = ctypes.CDLL(None)
        if hasattr(library, name):
            getattr(library, name)(*arguments)


def return_freed() -> None:
    """Return what is freed at once, from now on, for the rest of the process.

    glibc learns from large blocks that come and go to keep them, among small ones that stay.
    """
    _call("mallopt", M_MMAP_THRESHOLD, RETURNED)
    _call("mallopt", M_TRIM_THRESHOLD, RETURNED)


def give_back() -> None:
    """Return what has been freed."""
    _call("malloc_trim", 0)
