"""Small models rounded to nearest, which the files here share."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import tfmq
from tfmq.models.sampler import LoopSampler
from tfmq.recipes import Recipe
from tfmq.recipes.recipe import Calibration


def quick_recipe(scheme: str, **activations: Any) -> Recipe:
    """Return the recipe of a scheme that rounds to nearest, without a search of any kind, calibrated at three
    timesteps.
    """
    recipe = tfmq.scheme(scheme)
    assert recipe.rounding.solver == "nearest"
    return replace(
        recipe,
        calibration=Calibration(samples=1, steps=3),
        weights=replace(recipe.weights, ranges="min_max"),
        activations=replace(recipe.activations, ranges="min_max", **activations),
        # The codes are the same, whatever units are told of their inputs.
        rounding=replace(recipe.rounding, inputs="full"),
    )


@pytest.fixture(scope="session")
def quick() -> Callable[..., Recipe]:
    """Return `quick_recipe`."""
    return quick_recipe


@pytest.fixture(scope="session")
def rounded(sampler: Callable[..., LoopSampler]) -> Callable[..., LoopSampler]:
    """Return a function that gives a sampler of its own with the W4A8 model of a name, by simulated
    arithmetic; `tokens` are the grids of the linear layers' inputs.
    """
    made: dict[tuple[str, str], LoopSampler] = {}

    def give(name: str, tokens: str = "static") -> LoopSampler:
        if (name, tokens) not in made:
            made[name, tokens] = sampler(name)
            tfmq.quantize(made[name, tokens], quick_recipe("rtn_w4a8", tokens=tokens))
        return copy.deepcopy(made[name, tokens])

    return give
