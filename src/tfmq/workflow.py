"""The order of quantization: probe, calibrate, fit ranges, temporal block, units, pack. Nothing else knows it."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from zlib import crc32

import torch
from torch import Tensor

from tfmq.calibration.choice import InputErrors, choose_inputs
from tfmq.calibration.ranges import SITE_BYTES, collect, fit_site
from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.calibration.trajectory import recorded_calls
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import Plan, activation_sites, calibrated_layers, pack_all, prepare
from tfmq.nn.swap import precision
from tfmq.progress import Progress, silent
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.reconstruction.sequence import learned, reconstruct_units, restore
from tfmq.reconstruction.tiar import full_features, reconstruct_temporal
from tfmq.reconstruction.unit import UnitReport, settle
from tfmq.reconstruction.units import Unit, find_units
from tfmq.storage.journal import Journal
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import install_tables, quantized_features
from tfmq.temporal.disturbance import Disturbance, disturbance
from tfmq.temporal.probe import probe


@dataclass(frozen=True)
class Outcome:
    """What quantization did: one report a unit, the disturbance of temporal features at the calibrated timesteps, and measured inputs."""

    units: tuple[UnitReport, ...]
    disturbance: Disturbance
    inputs: Mapping[str, InputErrors] = field(default_factory=dict)


class Helpers(Protocol):
    """Does parts of a job elsewhere, in any order, and gives back the numbers of those that are done.

    `record(batches)` leaves the calls of each batch in a part of the job's store, by the batch's number; `reconstruct(units)` leaves units, by
    their numbers, in the job's journal. Whoever helps does both with the functions of this file.
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


def record_calibration(sampler: Sampler, recipe: Recipe, store: CalibrationStore, *, seed: int, helpers: Helpers | None, progress: Progress) -> None:
    """Run the sampler in full precision and store every denoiser call."""
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


def check_time(sampler: Sampler, recipe: Recipe, resources: Resources) -> None:
    """Refuse a budget of time that is gone before the first unit.

    Raises:
        ValueError: says what the calibration takes by the time of one call of its batch.
    """
    if resources.time_budget is None:
        return
    config = recipe.calibration
    example = sampler.example().resized(min(config.batch_size, config.samples))
    with torch.no_grad():
        sampler.denoiser(example)
        began = time.perf_counter()
        sampler.denoiser(example)
    calls = -(-config.samples // config.batch_size) * config.steps
    # Drawn once, and once more looked at for the ranges of activations.
    needed = 2 * calls * (time.perf_counter() - began)
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
    methods = {f"{name}.input_quantizer": layer.input.ranges for name, layer in plan.layers.items() if layer.input}
    methods |= {owner: quantizer.ranges for owner, (_, quantizer) in plan.products.items() if quantizer}
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
                    method = methods.get(name) or methods[name.rpartition(".tfmq_products")[0]]
                    fit_site(sites[name], statistics[name], method=method)  # type: ignore[arg-type]
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


@dataclass(frozen=True)
class Prepared:
    """A denoiser whose units are next.

    With its temporal block, what that gives in full precision at the calibrated timesteps, and the measured inputs.
    """

    block: TemporalBlock
    full: dict[str, Tensor]
    steps: StepContext
    units: tuple[Unit, ...]
    inputs: Mapping[str, InputErrors]


def prepare_units(
    sampler: Sampler,
    recipe: Recipe,
    *,
    seed: int,
    store: CalibrationStore,
    journal: Journal,
    helpers: Helpers | None = None,
    resources: Resources = UNLIMITED,
    progress: Progress = silent,
) -> Prepared:
    """Do, or read back from the journal, all stages before the units; see `quantize_denoiser`."""
    resources.prepare()
    denoiser = sampler.denoiser
    denoiser.module.requires_grad_(False).eval()
    block = probe(denoiser, sampler.example())
    plan = make_plan(recipe, block.trace)

    def record() -> dict[str, Tensor]:
        check_time(sampler, recipe, resources)
        store.clear()
        record_calibration(sampler, recipe, store, seed=seed, helpers=helpers, progress=progress)
        return {"calls": torch.tensor(len(store))}

    journal.stage("calibration", record)
    device = next(denoiser.module.parameters()).device
    steps = StepContext(store.timesteps()).to(device)
    prepare(denoiser.module, plan, steps, timestep=denoiser.timestep)
    full = full_features(block, steps.timesteps, block.features)
    ranges = journal.stage("activations", lambda: fit_activations(sampler, plan, steps, store, resources=resources, progress=progress))
    for name, quantizer in activation_sites(denoiser.module).items():
        quantizer.fit(ranges[f"{name}.scale"], ranges[f"{name}.zero_point"])
    measured = {name: layer for name, layer in calibrated_layers(denoiser.module).items() if plan.measures(name)}
    inputs = choose_inputs(denoiser, measured, StoredBatches(store, recipe.calibration.interval), journal=journal, progress=progress)
    temporal = [layer.name for layer in block.trace.temporal if layer.name in plan.layers]
    maintained = temporal if recipe.temporal.maintenance != "none" else []
    if maintained:
        layers = {name: layer for name, layer in calibrated_layers(denoiser.module).items() if name in maintained}
        for layer in layers.values():
            settle(layer)
        restore(layers, journal.stage("temporal", lambda: maintain_temporal(block, layers, steps, store, recipe, seed=seed, progress=progress)))
        if recipe.temporal.maintenance != "block":
            scope = recipe.temporal.scope if recipe.temporal.maintenance == "selected" else None
            install_tables(block, {name: full[name] for name in block.cacheable}, steps, table_format=recipe.temporal.table, scope=scope)
    units = find_units(denoiser.module, [layer.name for layer in block.trace.layers if layer.name in plan.layers], exclude=maintained)
    return Prepared(block, full, steps, units, inputs)


def quantize_denoiser(
    sampler: Sampler,
    recipe: Recipe,
    *,
    seed: int,
    store: CalibrationStore,
    journal: Journal,
    helpers: Helpers | None = None,
    resources: Resources = UNLIMITED,
    progress: Progress = silent,
    began: float | None = None,
) -> Outcome:
    """Quantize the sampler's denoiser in place by `recipe`; afterwards it holds packed layers only.

    The stages are journalled: with a journal of an interrupted run, finished stages are read back, and the result is the same to the byte.
    `helpers` do what they can ahead of this process: the trajectory, and units that do not wait for each other.
    A budget of time counts from `began`, a value of `time.perf_counter`, else from now.
    """
    began = time.perf_counter() if began is None else began
    denoiser = sampler.denoiser
    prepared = prepare_units(sampler, recipe, seed=seed, store=store, journal=journal, helpers=helpers, resources=resources, progress=progress)
    block, steps = prepared.block, prepared.steps
    reports = reconstruct_units(
        denoiser,
        prepared.units,
        steps,
        store,
        recipe.rounding,
        recipe.learning,
        interval=recipe.calibration.interval,
        seeds={unit.name: stage_seed(seed, unit.name) for unit in prepared.units},
        resources=resources,
        elapsed=lambda: journal.seconds_before + time.perf_counter() - began,
        journal=journal,
        ahead=None if helpers is None else helpers.reconstruct,
        progress=progress,
    )
    pack_all(denoiser.module)
    return Outcome(reports, disturbance(steps.timesteps, prepared.full, quantized_features(block, steps, block.features)), prepared.inputs)
