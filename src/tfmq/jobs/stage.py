"""A stage as a value: what it is called in the journal, how its result is found, what becomes of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from torch import Tensor

from tfmq.jobs.job import Job, Work

T = TypeVar("T")
Tensors = dict[str, Tensor]
# One part of a job: a function, or a `Kept` where the journal keeps what it finds.
Stage = Callable[[Job, Work], None]


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A stage whose result the journal keeps, so that an interrupted job reads it back.

    Attributes:
        name: the journal's name of the result, and of nothing else in the job.
        compute: finds the result.
        apply: gives the result to the model and to later stages. It runs after `compute`, and alone where
            the result was there.
    """

    name: str
    compute: Callable[[Job, Work], Tensors]
    apply: Callable[[Job, Work, Tensors], T]

    def __call__(self, job: Job, work: Work) -> T:
        """Take the job through this stage; return what `apply` does."""
        return self.apply(job, work, job.kept(self.name, partial(self.compute, job, work)))


@dataclass(frozen=True)
class Where:
    """A stage that some recipes or models have no need of.

    Attributes:
        needed: says whether this job needs it, by a value that is true or not empty.
        then: the stage.
    """

    needed: Callable[[Job, Work], object]
    then: Stage

    def __call__(self, job: Job, work: Work) -> None:
        """Take the job through the stage where it is needed."""
        if self.needed(job, work):
            self.then(job, work)


def nothing(job: Job, work: Work, found: Tensors) -> None:
    """Apply nothing: the stage has left elsewhere what later ones read, or nobody here reads it."""
