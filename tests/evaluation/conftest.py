"""A quantized tiny model with its reference, and a progress that remembers."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from diffusers import DDIMScheduler
from torch import Tensor

import tfmq
from tfmq.models.sampler import LoopSampler
from tfmq.progress import Advance
from tfmq.recipes.recipe import Calibration, Maintenance, Recipe


class NoiseOnly(DDIMScheduler):
    """Leaves out the variance that some models predict in further channels."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        return super().step(model_output[:, : sample.shape[1]], timestep, sample, **options)


class Remembering:
    """A progress that keeps, for each bar, how much was done and how much there was to do."""

    def __init__(self) -> None:
        self.seen: dict[str, tuple[int, int]] = {}

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Advance]:
        def advance(amount: int = 1) -> None:
            self.seen[description] = self.seen[description][0] + amount, total

        self.seen[description] = 0, total
        yield advance


@pytest.fixture
def bar() -> Remembering:
    return Remembering()


def quick(maintenance: Maintenance = "cache") -> Recipe:
    """Return a recipe that takes a second on a tiny model: nobody here looks at how weights are rounded."""
    recipe = tfmq.scheme("w4a8")
    rounding = replace(recipe.rounding, solver="nearest")
    temporal = replace(recipe.temporal, maintenance=maintenance, rounding=rounding)
    calibration = Calibration(samples=2, steps=4, interval=2, batch_size=2)
    return replace(recipe, rounding=rounding, temporal=temporal, calibration=calibration)


@pytest.fixture(scope="session")
def pairs() -> dict[tuple[str, Maintenance], tuple[LoopSampler, LoopSampler]]:
    """Return where `pair` keeps what it made."""
    return {}


@pytest.fixture
def pair(
    sampler: Callable[..., LoopSampler],
    pairs: dict[tuple[str, Maintenance], tuple[LoopSampler, LoopSampler]],
) -> Callable[..., tuple[LoopSampler, LoopSampler]]:
    """Return a function that gives the sampler of a full-precision model, and one of its quantized twin:
    copies of what was made once.
    """

    def make(name: str = "unet", maintenance: Maintenance = "cache") -> tuple[LoopSampler, LoopSampler]:
        key = name, maintenance
        if key not in pairs:
            reference, quantized = (sampler(name, scheduler=NoiseOnly()) for _ in range(2))
            tfmq.quantize(quantized, quick(maintenance))
            pairs[key] = reference, quantized
        reference, quantized = (copy.deepcopy(made) for made in pairs[key])
        return reference, quantized

    return make
