"""A quantized model without calibration: all that its speed depends on, and nothing that its images depend
on.
"""

import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq.backends.execution import execute
from tfmq.calibration.store import CalibrationStore
from tfmq.jobs.job import Job
from tfmq.jobs.workflow import LAYING_OUT, run
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import pack_all
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.solvers import Rounding
from tfmq.storage.journal import Journal


@dataclass
class _Still:
    """A denoiser that is calibrated on one call that is there already."""

    denoiser: Denoiser
    inputs: Inputs

    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Refuse to draw: a trial needs no image."""
        raise AssertionError("a trial draws nothing")

    def example(self) -> Inputs:
        """Return the one call that is there."""
        return self.inputs

    def describe(self) -> dict[str, Any]:
        """Return nothing: no job is resumed with it."""
        return {}


def _hasty(recipe: Recipe) -> Recipe:
    """Return a recipe of the same form whose values cost no time."""
    temporal = replace(recipe.temporal, rounding=Rounding(solver="nearest"))
    weights, activations = (
        replace(recipe.weights, ranges="min_max"),
        replace(recipe.activations, ranges="min_max"),
    )
    return replace(recipe, weights=weights, activations=activations, temporal=temporal)


@torch.no_grad()
def trial(sampler: Sampler, recipe: Recipe, *, backend: str) -> Denoiser:
    """Return a copy of the denoiser that runs as `recipe` would have it at the timestep of the sampler's
    example.

    Grids are those of the extremes of weights and of one call; temporal features come from tables if they
    would. The sampler's own model stays as it is, so both are in memory.
    """
    original, example = sampler.denoiser, sampler.example()
    denoiser = Denoiser(
        deepcopy(original.module).requires_grad_(False).eval(),
        sample=original.sample,
        timestep=original.timestep,
    )
    with tempfile.TemporaryDirectory(prefix="tfmq-") as folder:
        store = CalibrationStore(Path(folder) / "calls")
        store.append(example)
        run(
            Job(
                sampler=_Still(denoiser, example),
                recipe=_hasty(recipe),
                store=store,
                journal=Journal(None, {}, resume=False),
            ),
            LAYING_OUT,
        )
    pack_all(denoiser.module)
    execute(denoiser.module, backend)
    return denoiser
