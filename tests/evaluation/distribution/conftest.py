"""Features that are simply held, in chunks."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tfmq.evaluation.distribution.features import Kind


@dataclass(frozen=True)
class Held:
    """The same features for every kind, handed out `size` rows at a time."""

    values: Tensor
    size: int = 7

    def __len__(self) -> int:
        return len(self.values)

    def chunks(self, kind: Kind) -> Iterator[Tensor]:
        return iter(self.values.split(self.size))


Make = Callable[..., Held]


@pytest.fixture
def held() -> Make:
    """Return a function that gives random features of a seed, `[count, width]`, in chunks."""

    def make(seed: int = 0, *, count: int = 40, width: int = 6, size: int = 7, shift: float = 0.0) -> Held:
        return Held(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift, size)

    return make


@pytest.fixture
def whitened() -> Callable[[int, int], Tensor]:
    """Return a function that gives features `[count, width]`, float64, whose mean is exactly 0 and whose
    covariance exactly 1.
    """

    def make(count: int, width: int) -> Tensor:
        raw = torch.randn(count, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        centred = raw - raw.mean(dim=0)
        factor = torch.linalg.cholesky(centred.T @ centred / (count - 1))
        return torch.linalg.solve_triangular(factor, centred.T, upper=False).T

    return make
