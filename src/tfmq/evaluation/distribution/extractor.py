"""From images to features: the contract, the registry, and how an extractor names a metric."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFolder

# The extractor with which metrics have the plain names of the papers.
STANDARD = "inception"
# Names on other extractors of metrics whose plain names stand for Inception.
ELSEWHERE = {"fid": "fd", "sfid": "sfd"}


class Extractor(Protocol):
    """Computes features of uint8 images `[N, H, W, 3]`, each kind `[N, d]`.

    `kinds` are those it has; `describe()` says as JSON values what the features depend on, for the record and
    for resumed runs.
    """

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Return the kinds of features that it computes."""

    def describe(self) -> dict[str, Any]:
        """Return what the features depend on, as JSON values."""

    def __call__(self, images: Images) -> Mapping[Kind, Tensor]: ...


EXTRACTORS: dict[str, Callable[[WeightFolder], Extractor]] = {}


def register_extractor(
    name: str,
) -> Callable[[Callable[[WeightFolder], Extractor]], Callable[[WeightFolder], Extractor]]:
    """Return a decorator that registers what builds an extractor, from where weights lie, under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def fill(build: Callable[[WeightFolder], Extractor]) -> Callable[[WeightFolder], Extractor]:
        if name in EXTRACTORS:
            raise ValueError(f"an extractor called {name} is registered already")
        EXTRACTORS[name] = build
        return build

    return fill


def labelled(metric: str, extractor: str) -> str:
    """Return the name of a metric on an extractor: another one than the papers' is part of it, and a Frechet
    distance on it is no FID.

    >>> labelled("fid", "inception"), labelled("fid", "pooled-pixels"), labelled("kid", "pooled-pixels")
    ('fid', 'fd[pooled-pixels]', 'kid[pooled-pixels]')
    """
    return metric if extractor == STANDARD else f"{ELSEWHERE.get(metric, metric)}[{extractor}]"
