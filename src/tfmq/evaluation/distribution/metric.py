"""A metric of images as a set: the contract, and the registry of all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol
from warnings import catch_warnings, simplefilter

import torch
from torch import Tensor, nn

from tfmq.evaluation.distribution.features import Features, Kind, Moments
from tfmq.storage.errors import ForeignFileError


@dataclass(frozen=True)
class Score:
    """A metric's value, and its deviation over subsets where it is a mean over them."""

    value: float
    deviation: float | None = None


class SetMetric(Protocol):
    """A metric of a set of images, computed by a library on features.

    `library` is the module that computes it, `kind` the features it needs; `compares` tells whether there is
    a second set, `of_moments` whether that may be statistics. `__call__` returns its scores by name: most
    metrics have one. What is drawn at random, such as subsets, follows from `seed`.

    Raises (from `__call__`):
        ValueError: too few images, or statistics where features are needed.
        MissingExtraError: the library is not installed.
    """

    library: str
    kind: Kind
    compares: bool
    of_moments: bool

    def __call__(
        self, images: Features, others: Features | Moments | None, *, seed: int
    ) -> Mapping[str, Score]: ...


SET_METRICS: dict[str, SetMetric] = {}


def register_metric(name: str) -> Callable[[type[SetMetric]], type[SetMetric]]:
    """Return a decorator that registers a metric under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def fill(metric: type[SetMetric]) -> type[SetMetric]:
        if name in SET_METRICS:
            raise ValueError(f"a metric called {name} is registered already")
        SET_METRICS[name] = metric()
        return metric

    return fill


class Given(nn.Module):
    """The extractor of a library's metric that is handed features instead of images: the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        """Return the features as they are."""
        return features


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Let what a library draws from torch's global generator follow from `seed`, and restore the
    generator.
    """
    with torch.random.fork_rng(devices=[]), catch_warnings():
        # The libraries warn that features are kept in memory, which is what they are there for.
        simplefilter("ignore")
        torch.manual_seed(seed)
        yield


def features_of(others: Features | Moments | None, metric: str) -> Features:
    """Return the second set as features.

    Raises:
        ForeignFileError: it is a statistics file, which has none.
    """
    if others is None or isinstance(others, Moments):
        raise ForeignFileError(
            f"{metric} needs images to compare with, and a statistics file "
            "holds only mean and covariance; pass the images"
        )
    return others
