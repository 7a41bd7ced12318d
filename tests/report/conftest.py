"""A comparison made of numbers, without a model."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tfmq.evaluation.comparison import Comparison
from tfmq.evaluation.paired import paired_fidelity
from tfmq.temporal.disturbance import disturbance


@pytest.fixture
def comparison() -> Callable[..., Comparison]:
    """Return a function that gives a comparison of random images, and of features with noise of the given size."""

    def make(*, count: int = 3, side: int = 8, channels: int = 3, features: int = 2, noise: float = 0.1, steps: int = 5) -> Comparison:
        rng = np.random.default_rng(0)
        reference = rng.integers(0, 200, (count, side, side, channels), dtype=np.uint8)
        quantized = reference + rng.integers(0, 9, reference.shape, dtype=np.uint8)
        generator = torch.Generator().manual_seed(0)
        full = {f"layer.{i}": torch.randn(steps, 16, generator=generator) for i in range(features)}
        low = {name: value + noise * torch.randn(value.shape, generator=generator) for name, value in full.items()}
        temporal = disturbance(torch.arange(steps) * 100.0, full, low)
        return Comparison(reference, quantized, paired_fidelity(reference, quantized), temporal)

    return make
