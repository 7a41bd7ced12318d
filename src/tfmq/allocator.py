"""Give memory back to the system that the C library (glibc) or the process would keep for later; where the
system is another, nothing happens.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from torch import Tensor

# Bytes. Blocks of at least this size go back to the system as soon as they are freed.
RETURNED = 2**20
# Numbers of two parameters of `mallopt`, from malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
# Linux 5.4 and later know this advice. Unlike its relatives it never loses what was written.
MADV_PAGEOUT = 21
# Seconds between two times of letting go. A file is read at about a gigabyte a second.
PAUSE = 0.02


def _call(name: str, *arguments: Any) -> None:
    if sys.platform.startswith("linux"):
        function = getattr(ctypes.CDLL(None), name, None)
        if function is not None:
            function(*arguments)


def return_freed() -> None:
    """Return what is freed at once, from now on, for the rest of the process.

    glibc learns from large blocks that come and go to keep them, among small ones that stay.
    """
    _call("mallopt", M_MMAP_THRESHOLD, RETURNED)
    _call("mallopt", M_TRIM_THRESHOLD, RETURNED)


def give_back() -> None:
    """Return what has been freed."""
    _call("malloc_trim", 0)


def page_out(tensor: Tensor) -> None:
    """Let go of the memory of a contiguous tensor on the CPU that nothing reads soon.

    A tensor that a checkpoint's file is mapped for, as safetensors does, is read from the file again when it
    is needed; others stay, or go to swap where there is some.
    """
    begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.numel() * tensor.element_size() - begin
    if tensor.device.type == "cpu" and size > 0:
        _call("madvise", ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_PAGEOUT)


@contextmanager
def paging_out(tensor: Tensor) -> Iterator[None]:
    """Let go of a tensor's memory again and again while the block, which reads it from end to end, makes
    something else of it: both in memory would be the most that a process holds.
    """
    done = Event()

    def let_go() -> None:
        while not done.wait(PAUSE):
            page_out(tensor)

    thread = Thread(target=let_go, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        page_out(tensor)
