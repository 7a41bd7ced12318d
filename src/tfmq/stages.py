"""The stages before the units, each a function of a sampler, a recipe and what earlier stages stored."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

from tfmq.calibration.ranges import KEPT, SHRINKS, SITE_BYTES, collect, fit_site
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import recorded_calls
from tfmq.calibration.variety import warn_of_single_values
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.operation import weight_of
from tfmq.nn.plan import Plan, activation_sites
from tfmq.nn.swap import precision
from tfmq.numerics.ranges import search
from tfmq.progress import Progress, seconds_of
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import Resources
from tfmq.reconstruction.sensitivity import SECONDS_A_WEIGHT, STEP_RUNS
from tfmq.reconstruction.sequence import learned
from tfmq.reconstruction.tiar import reconstruct_temporal
from tfmq.temporal.block import TemporalBlock

# A call whose quantizers look at their inputs, in calls.
OBSERVED = 2.0


# Is told about how many seconds will go by.
Foretold = Callable[[float], None]


class Helpers(Protocol):
    """Does parts of a job elsewhere, in any order, and gives back the numbers of those that are done.

    `record(batches)` leaves the calls of each batch in a part of the job's store, by the batch's number; `reconstruct(units)` leaves units, by
    their numbers, in the job's journal. Whoever helps does both with the functions that the job itself would call.
    """

    def record(self, batches: Sequence[range]) -> Iterator[int]: ...

    def reconstruct(self, units: Sequence[int]) -> Iterator[int]: ...


def stage_seed(seed: int, name: str) -> int:
    """Return the seed of a stage: its own, so that the order and the number of stages before it do not matter."""
    return crc32(f"{name} {seed}".encode())


def record_batch(sampler: Sampler, recipe: Recipe, sink: Callable[[Inputs], None], indices: range, *, seed: int) -> None:
    """Run the sampler in full precision for the images `indices`, and hand every denoiser call to `sink`."""
    with recorded_calls(sampler.denoiser, sink):
        sampler.run(indices, steps=recipe.calibration.steps, seed=stage_seed(seed, "calibration"))


def record_calibration(
    sampler: Sampler, recipe: Recipe, block: TemporalBlock, store: CalibrationStore, *, seed: int, helpers: Helpers | None, progress: Progress
) -> None:
    """Run the sampler in full precision and store every denoiser call; warn of classes and the like that are one and the same in all of them."""
    config = recipe.calibration
    batches = [range(start, min(start + config.batch_size, config.samples)) for start in range(0, config.samples, config.batch_size)]
    with progress("calibration: sampling", len(batches) * config.steps) as advance:

        def sink(inputs: Inputs) -> None:
            store.append(inputs)
            advance()

        if helpers is None:
            for indices in batches:
                record_batch(sampler, recipe, sink, indices, seed=seed)
        else:
            for _ in helpers.record(batches):
                advance(config.steps)
            store.adopt(range(len(batches)))
    warn_of_single_values(sampler.denoiser, sampler.example(), block.trace, store, batches)


@torch.no_grad()
def calibration_seconds(sampler: Sampler, recipe: Recipe, plan: Plan, block: TemporalBlock, resources: Resources) -> float:
    """Return about what the stages before the units take: by the time of one call, of one search for a range and of one pass of the block."""
    config, learning = recipe.calibration, recipe.temporal.learning
    example = sampler.example().resized(min(config.batch_size, config.samples))
    a_call = seconds_of(lambda: sampler.denoiser(example)) * -(-config.samples // config.batch_size) * config.steps
    inputs = [layer.input for layer in plan.layers.values()]
    operands = [quantizer for count, quantizer in plan.products.values() for _ in range(2 * count)]
    quantizers = [quantizer for quantizer in (*inputs, *operands) if quantizer and quantizer.tokens != "dynamic"]
    passes = -(-len(quantizers) // (resources.sites_at_once(SITE_BYTES) or max(1, len(quantizers))))
    searched = [quantizer for quantizer in quantizers if quantizer.ranges == "search"]
    # One grid for all timesteps is searched for beside those of each.
    searches = sum(2 if quantizer.per_step == "measured" else 1 for quantizer in searched)
    values = torch.linspace(-1, 1, KEPT).reshape(1, -1)
    a_range = seconds_of(lambda: search(values, searched[0].format, shrinks=SHRINKS)) if searched else 0.0
    maintained = [layer.name for layer in block.trace.temporal if layer.name in plan.layers] if recipe.temporal.maintenance != "none" else []
    a_step = 0.0
    if maintained:
        timesteps = block.at(torch.zeros(1))
        weights = sum(weight_of(block.module.get_submodule(name)).numel() for name in maintained)
        a_step = STEP_RUNS * seconds_of(lambda: block.run(timesteps, block.features)) + SECONDS_A_WEIGHT * weights
    return (1 + OBSERVED * passes) * a_call + searches * a_range + learning.iterations * a_step


def expected_bytes(example: Inputs, recipe: Recipe) -> int:
    """Return the least bytes that a calibration leaves on disk: the sample of every call."""
    return recipe.calibration.samples * recipe.calibration.steps * example.sample.numel() * example.sample.element_size()


def check_room(sampler: Sampler, recipe: Recipe, directory: Path) -> None:
    """Refuse a calibration that the disk of `directory` cannot hold.

    Raises:
        ValueError: says what it takes of disk and time.
    """
    needed, free = expected_bytes(sampler.example(), recipe), shutil.disk_usage(directory).free
    if needed <= free:
        return
    config = recipe.calibration
    with torch.no_grad():
        a_call = seconds_of(lambda: sampler.denoiser(sampler.example()))
    raise ValueError(
        f"a calibration of {config.samples} images in {config.steps} steps takes at least {needed / 1e9:.3g} GB of disk, where "
        f"{free / 1e9:.3g} GB are free, and about {a_call * config.samples * config.steps / 86400:.3g} days; lower the images (--calib-size) or steps"
    )


def check_time(sampler: Sampler, recipe: Recipe, plan: Plan, block: TemporalBlock, resources: Resources) -> None:
    """Refuse a budget of time that is gone before the first unit.

    Raises:
        ValueError: says about what the calibration takes.
    """
    if resources.time_budget is None:
        return
    needed = calibration_seconds(sampler, recipe, plan, block, resources)
    if needed > resources.time_budget:
        raise ValueError(
            f"a time budget of {resources.time_budget:.0f} s is gone before the first unit: the calibration alone takes about {needed:.0f} s; "
            "raise it, or lower the steps, samples (--calib-size) or batch size of the calibration"
        )


def fit_activations(
    sampler: Sampler, plan: Plan, steps: StepContext, store: CalibrationStore, *, resources: Resources, progress: Progress
) -> dict[str, Tensor]:
    """Fit every activation quantizer on the full-precision trajectory; return the fitted tensors.

    The trajectory is run again for each group of quantizers that fits the memory.
    """
    module = sampler.denoiser.module
    sites = activation_sites(module)
    if not sites:
        return {}
    plans = {f"{name}.input_quantizer": layer.input for name, layer in plan.layers.items() if layer.input}
    plans |= {owner: quantizer for owner, (_, quantizer) in plan.products.items() if quantizer}
    names, size = list(sites), resources.sites_at_once(SITE_BYTES) or len(sites)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    amount = len(groups) * len(store) + len(sites)
    with progress("calibration: activation ranges", amount) as advance, precision(module, weights="full", inputs="quantized"):
        for group in groups:
            seen = {name: sites[name] for name in group}
            others = [quantizer for name, quantizer in sites.items() if name not in seen]
            statistics = collect(sampler.denoiser, seen, steps, store, calls=len(store), advance=advance, passing=others)
            for name in group:
                if name in statistics:
                    chosen = plans.get(name) or plans[name.rpartition(".tfmq_products")[0]]
                    fit_site(
                        sites[name],
                        statistics[name],
                        method=chosen.ranges,  # type: ignore[arg-type]
                        shared=chosen.zero_points(name),
                        measured=chosen.per_step == "measured",
                    )
                advance()
    return {f"{name}.{key}": value for name, quantizer in sites.items() for key, value in quantizer.state_dict().items()}


def maintain_temporal(
    block: TemporalBlock,
    layers: dict[str, CalibratedLayer],
    steps: StepContext,
    store: CalibrationStore,
    recipe: Recipe,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Tensor]:
    """Learn the roundings of the temporal block (TIAR); return what was learned."""
    config = recipe.temporal.learning
    with progress("temporal block: TIAR", config.iterations) as advance:
        reconstruct_temporal(block, layers, steps, config, batches=store, seed=stage_seed(seed, "temporal"), advance=advance)
    return learned(layers)
