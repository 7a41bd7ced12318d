"""Work in batches that outlives an interruption and can be shared among processes: each batch of images is a
file of results.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.sampling import batches
from tfmq.progress import Progress
from tfmq.storage.journal import Journal


@dataclass(frozen=True)
class Shard:
    """The batches that this process computes: those whose number is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard is I/N with 0 <= I < N, got {self.index}/{self.count}")

    def has(self, number: int) -> bool:
        """Whether a batch is one of this shard's."""
        return number % self.count == self.index


class BatchHelpers(Protocol):
    """Computes batches of a stage elsewhere: those that it gives back are in the journal by then, and none
    has to be.
    """

    def __call__(self, name: str, todo: Sequence[range], /) -> Iterator[range]: ...


def nobody(name: str, todo: Sequence[range]) -> Iterator[range]:
    """Compute nothing elsewhere."""
    return iter(())


@dataclass(frozen=True)
class StoredResults:
    """Results of `count` images in the journal's files `names`, in the order of the images; see
    `Features`.
    """

    journal: Journal
    names: tuple[str, ...]
    count: int

    def __len__(self) -> int:
        return self.count

    @property
    def complete(self) -> bool:
        """Whether every batch is there, by whichever process."""
        return all(self.journal.done(name) for name in self.names)

    def parts(self) -> Iterator[dict[str, Tensor]]:
        """Stream the results batch by batch."""
        for name in self.names:
            yield self.journal.read(name)

    def chunks(self, kind: Kind) -> Iterator[Tensor]:
        """Yield the features of one kind, batch by batch, each `[n, d]`."""
        for part in self.parts():
            yield part[kind]

    def joined(self, key: str, *, dim: int = 0) -> Tensor:
        """Return one result of all images."""
        return torch.cat([part[key] for part in self.parts()], dim=dim)


@dataclass(frozen=True)
class Stages:
    """Runs what has not been done yet of a job.

    Args:
        journal: keeps every batch; has a directory.
        batch_size: images of a batch.
        shard: which batches are this process's.
        progress: shows a bar a stage.
        helpers: are asked before this process computes a batch itself.
    """

    journal: Journal
    batch_size: int
    shard: Shard
    progress: Progress
    helpers: BatchHelpers = nobody

    def run(self, name: str, count: int, compute: Callable[[range], dict[str, Tensor]]) -> StoredResults:
        """Compute the results of the images 0 to `count - 1` with `compute`, one batch at a time, and return
        where they are.
        """
        ranges = batches(count, self.batch_size)
        todo = [
            indices
            for number, indices in enumerate(ranges)
            if self.shard.has(number) and not self.journal.done(_file(name, indices))
        ]
        with self.progress(name, sum(map(len, todo))) as advance:
            helped = set()
            for indices in self.helpers(name, todo):
                helped.add(indices)
                advance(len(indices))
            for indices in todo:
                if indices not in helped:
                    self.batch(name, indices, compute)
                    advance(len(indices))
        return StoredResults(self.journal, tuple(_file(name, indices) for indices in ranges), count)

    def batch(self, name: str, indices: range, compute: Callable[[range], dict[str, Tensor]]) -> None:
        """Compute the results of the images `indices`, unless they are there."""
        self.journal.stage(_file(name, indices), partial(compute, indices))


def _file(name: str, indices: range) -> str:
    """Return the journal's name of a batch."""
    return f"{name.replace(' ', '_')}-{indices.start:08d}"
