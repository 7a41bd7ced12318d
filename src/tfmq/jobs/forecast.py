"""What a calibration takes of time and disk, said before it begins and refused where it cannot be had."""

import shutil
from collections.abc import Sequence

import torch

from tfmq.calibration.ranges import KEPT, SHRINKS, SITE_BYTES
from tfmq.jobs.job import Job, Work
from tfmq.models.denoiser import Inputs
from tfmq.nn.operation import weight_of
from tfmq.numerics.ranges import search
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.budget import Cost
from tfmq.reconstruction.sensitivity import (
    ROWS,
    SECONDS_A_WEIGHT,
    STEP_RUNS,
    closed_form_products,
    predicted_costs,
    products_a_second,
)
from tfmq.reconstruction.solvers import SOLVERS
from tfmq.reconstruction.tiar import MOST_PAIRS
from tfmq.reconstruction.units import Unit
from tfmq.stopwatch import seconds_of

# Cost of a call with observers on, relative to a plain call.
OBSERVED = 2.0
# Passes of the temporal block beside one for each layer: twice in full precision, twice to see the error.
BLOCK_RUNS = 4


@torch.no_grad()
def calibration_seconds(job: Job, work: Work) -> float:
    """Return about what the stages before the units take: by the time of one call, of one search for a range
    and of one pass of the block.
    """
    config, plan = job.recipe.calibration, work.plan
    example = job.sampler.example().resized(min(config.batch_size, config.samples))
    a_call = (
        seconds_of(lambda: job.denoiser(example)) * -(-config.samples // config.batch_size) * config.steps
    )
    inputs = [layer.input for layer in plan.layers.values()]
    operands = [quantizer for count, quantizer in plan.products.values() for _ in range(2 * count)]
    quantizers = [
        quantizer for quantizer in (*inputs, *operands) if quantizer and quantizer.tokens != "dynamic"
    ]
    passes = -(-len(quantizers) // (job.resources.sites_at_once(SITE_BYTES) or max(1, len(quantizers))))
    searched = [quantizer for quantizer in quantizers if quantizer.ranges == "search"]
    # One grid for all timesteps is searched for beside those of each.
    searches = sum(2 if quantizer.key == "measured" else 1 for quantizer in searched)
    values = torch.linspace(-1, 1, KEPT).reshape(1, -1)
    a_range = seconds_of(lambda: search(values, searched[0].grid, shrinks=SHRINKS)) if searched else 0.0
    return (1 + OBSERVED * passes) * a_call + searches * a_range + _block_seconds(job, work)


def _block_seconds(job: Job, work: Work) -> float:
    """Return about what TIAR takes, by the time of one pass of the temporal block, its sizes and this
    machine's speed.
    """
    block, recipe = work.block, job.recipe
    rounding, learning = recipe.temporal.rounding, recipe.temporal.learning
    maintained = [layer.name for layer in block.trace.temporal if layer.name in work.plan.layers]
    if recipe.temporal.maintenance == "none" or not maintained:
        return 0.0
    timesteps = block.at(torch.zeros(1))
    weights = [weight_of(block.module.get_submodule(name)) for name in maintained]
    a_pass = seconds_of(lambda: block.run(timesteps, block.features))
    a_step = STEP_RUNS * a_pass + SECONDS_A_WEIGHT * sum(weight.numel() for weight in weights)
    seconds = SOLVERS[rounding.solver].work(learning, 0) * a_step
    if SOLVERS[rounding.solver].runs_full:
        config = recipe.calibration
        pairs = min(MOST_PAIRS, config.samples * config.steps) if block.conditions else config.steps
        runs = -(-pairs // block.trace.batch) * (BLOCK_RUNS + len(weights))
        products = sum(closed_form_products(weight, pairs, rounding) for weight in weights)
        seconds += runs * a_pass + products / products_a_second()
    return seconds


def unit_costs(job: Job, units: Sequence[Unit]) -> list[Cost]:
    """Return what each unit will cost, by the time of its part in one call, its sizes and this machine's
    speed.
    """
    denoiser, recipe = job.denoiser, job.recipe
    device = next(denoiser.module.parameters()).device
    call = job.store.read(len(job.store) // 4).rows(0, ROWS).map(lambda tensor: tensor.to(device))
    samples = sum(len(batch) for batch in job.batches)
    costs = predicted_costs(
        denoiser, units, call, samples=samples, rounding=recipe.rounding, learning=recipe.learning
    )
    return [costs[unit.name] for unit in units]


def units_seconds(job: Job, units: Sequence[Unit]) -> float:
    """Return about what `units` take."""
    learning = job.recipe.learning
    iterations = learning.iterations if SOLVERS[job.recipe.rounding.solver].work(learning, 0) else 0
    return sum(cost.base + cost.step * iterations for cost in unit_costs(job, units))


def expected_bytes(example: Inputs, recipe: Recipe) -> int:
    """Return the least bytes that a calibration leaves on disk: the sample of every call."""
    return (
        recipe.calibration.samples
        * recipe.calibration.steps
        * example.sample.numel()
        * example.sample.element_size()
    )


def check_room(job: Job) -> None:
    """Refuse a calibration that the disk of the job's store cannot hold.

    Raises:
        ValueError: says what it takes of disk and time.
    """
    needed, free = (
        expected_bytes(job.sampler.example(), job.recipe),
        shutil.disk_usage(job.store.directory.parent).free,
    )
    if needed <= free:
        return
    config = job.recipe.calibration
    with torch.no_grad():
        a_call = seconds_of(lambda: job.denoiser(job.sampler.example()))
    raise ValueError(
        f"a calibration of {config.samples} images in {config.steps} steps "
        f"takes at least {needed / 1e9:.3g} GB of disk, where "
        f"{free / 1e9:.3g} GB are free, and about {a_call * config.samples * config.steps / 86400:.3g} "
        "days; lower the images (--calib-size) or steps"
    )


def check_time(job: Job, work: Work) -> None:
    """Refuse a budget of time that is gone before the first unit.

    Raises:
        ValueError: says about what the calibration takes.
    """
    budget = job.resources.time_budget
    if budget is None:
        return
    needed = calibration_seconds(job, work)
    if needed > budget:
        raise ValueError(
            f"a time budget of {budget:.0f} s is gone before the first unit: "
            f"the calibration alone takes about {needed:.0f} s; "
            "raise it, or lower the steps, samples (--calib-size) or batch size of the calibration"
        )
