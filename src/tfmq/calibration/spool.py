"""Tensors that grow batch by batch. They stay in memory while they fit and move to a file then; any of their
rows can be read from either.
"""

import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq.storage.atomic import full_disk_named
from tfmq.storage.raw import raw_bytes


class Column:
    """Batches `[n_i, ...]` of one tensor, one after the other; rows are numbered through.

    What is read has the order of axes in memory that `torch.cat` of the batches gives: kernels sum otherwise
    over another. They are not joined by it: that would hold them twice for a moment.
    """

    def __init__(self, spool: "Spool", first: Tensor) -> None:
        form = torch.cat([first[:1], first[:1]])
        self._order = tuple(sorted(range(form.ndim), key=form.stride, reverse=True))
        self._like, self._row = first[:0].clone(), tuple(first.shape[1:])
        self._spool = spool
        self._parts: list[Tensor] = []
        self._file: Any = None
        self._starts = [0]

    def add(self, part: Tensor) -> None:
        """Take the next batch."""
        self._starts.append(self._starts[-1] + len(part))
        self._parts.append(part)
        self._spool.took(self, part.numel() * part.element_size())

    def flush(self) -> None:
        """Move what is in memory to the file."""
        with full_disk_named(
            self._spool.directory,
            needed_bytes=sum(part.numel() * part.element_size() for part in self._parts),
        ):
            if self._file is None:
                self._file = self._spool.file()
                weakref.finalize(self, self._file.close)
            self._file.seek(0, 2)
            for part in self._parts:
                _whole(self._file.write, raw_bytes(part.detach().permute(self._order)))
        self._parts.clear()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, `[N, ...]`."""
        return self._starts[-1], *self._row

    def batch(self, number: int) -> Tensor:
        """Return a batch."""
        if self._file is None:
            return self._parts[number]
        return self[torch.arange(self._starts[number], self._starts[number + 1])]

    def __getitem__(self, index: Tensor) -> Tensor:
        """Return the rows `index` `[n]`."""
        # Read rows that follow each other at once.
        cuts = [0, *(index.diff() != 1).nonzero().flatten().add(1).tolist(), len(index)]
        runs = [(start, stop, int(index[start])) for start, stop in pairwise(cuts) if start < stop]
        shape = (len(index), *self._row)
        # Rows of a file go to host memory.
        device = self._like.device if self._file is None else None
        buffer = torch.empty([shape[axis] for axis in self._order], dtype=self._like.dtype, device=device)
        rows = buffer.permute([self._order.index(axis) for axis in range(len(shape))])
        if self._file is None:
            torch.cat(
                [
                    self._like,
                    *(
                        piece
                        for start, stop, first in runs
                        for piece in self._held(first, first + stop - start)
                    ),
                ],
                out=rows,
            )
            return rows
        octets = buffer.flatten().view(torch.uint8).numpy().data
        size = len(octets) // max(1, len(index))
        for start, stop, first in runs:
            self._file.seek(first * size)
            _whole(self._file.readinto, octets[start * size : stop * size])
        return rows.to(self._like.device)

    def _held(self, first: int, end: int) -> Iterator[Tensor]:
        """Yield the rows from `first` up to `end` from the batches in memory that hold them."""
        number = bisect_right(self._starts, first) - 1
        while first < end:
            start, stop = self._starts[number], min(end, self._starts[number + 1])
            yield self._parts[number][first - start : stop - start]
            first, number = stop, number + 1


def _whole(move: Callable[[memoryview], int], octets: memoryview) -> None:
    """Read or write all of `octets`: the system may stop before."""
    while len(octets):
        moved = move(octets)
        if not moved:
            raise OSError(f"a temporary file ends {len(octets)} bytes too early")
        octets = octets[moved:]


class Spool:
    """Gives out columns that together hold at most `most_bytes` in memory; beyond that, all of them go to
    nameless files in `directory`.

    Without a number they stay in memory. Values are the same either way. The files vanish with their columns,
    and with the process.
    """

    def __init__(self, directory: Path | None = None, most_bytes: int | None = None) -> None:
        self.directory = Path(tempfile.gettempdir()) if directory is None else directory
        self._left = most_bytes
        # Weak references: a column that nobody reads any more is freed.
        self._columns: weakref.WeakSet[Column] = weakref.WeakSet()

    def column(self, first: Tensor) -> Column:
        """Return a new column for tensors like `first`, which is not in it yet."""
        column = Column(self, first)
        self._columns.add(column)
        return column

    def took(self, column: Column, size: int) -> None:
        """Note that a column holds `size` bytes more."""
        if self._left is None:
            return
        full = self._left < 0
        self._left -= size
        if self._left < 0:
            for other in [column] if full else list(self._columns):
                other.flush()

    def file(self) -> Any:
        """Return a new nameless file."""
        self.directory.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self.directory, buffering=0)
