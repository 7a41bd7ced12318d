"""A quantized model without calibration: all that its speed depends on, and nothing that its images depend on."""

from copy import deepcopy
from dataclasses import replace

import torch

from tfmq.backends.execution import execute
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import activation_sites, pack_all, prepare
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.tiar import full_features
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import install_tables

# Scale of every activation grid of a trial. Time does not depend on it.
SCALE = 0.05


@torch.no_grad()
def trial(sampler: Sampler, recipe: Recipe, *, backend: str) -> Denoiser:
    """Return a copy of the denoiser that runs as `recipe` would have it at the timestep of the sampler's example.

    Weights are on the grids of their extremes, activations on arbitrary ones; temporal features come from tables if they would. The sampler's own
    model stays as it is, so both are in memory.
    """
    original, example = sampler.denoiser, sampler.example()
    denoiser = Denoiser(deepcopy(original.module).requires_grad_(False).eval(), sample=original.sample, timestep=original.timestep)
    block = TemporalBlock(denoiser, example)
    plan = make_plan(replace(recipe, weights=replace(recipe.weights, ranges="min_max")), block.trace)
    steps = StepContext(example.timestep[:1])
    prepare(denoiser.module, plan, steps, timestep=denoiser.timestep)
    for quantizer in activation_sites(denoiser.module).values():
        quantizer.fit(torch.full_like(quantizer.scale, SCALE), torch.full_like(quantizer.zero_point, quantizer.format.middle))
    if recipe.temporal.maintenance in ("cache", "selected"):
        features = full_features(block, steps.timesteps, block.cacheable)
        install_tables(block, features, steps, table_format=recipe.temporal.table)
    pack_all(denoiser.module)
    execute(denoiser.module, backend)
    return denoiser
