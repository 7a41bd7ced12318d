"""The order of quantization: probe, calibrate, fit ranges, temporal block, units, pack. Nothing else knows it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.calibration.choice import InputErrors, choose_inputs
from tfmq.calibration.replay import Upstream
from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.models.sampler import Sampler
from tfmq.nn.floating import Floating, floating
from tfmq.nn.plan import activation_sites, calibrated_embeddings, calibrated_layers, pack_all, prepare
from tfmq.progress import Advance, Progress, silent
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.resources import UNLIMITED, Resources
from tfmq.reconstruction.sequence import reconstruct_units, reconstructed, restore, unit_result
from tfmq.reconstruction.tiar import full_features
from tfmq.reconstruction.unit import UnitReport, settle
from tfmq.reconstruction.units import Unit, find_units
from tfmq.stages import (
    Foretold,
    Helpers,
    calibration_seconds,
    check_room,
    check_time,
    fit_activations,
    maintain_temporal,
    record_calibration,
    stage_seed,
)
from tfmq.storage.journal import Journal
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import install_tables, quantized_features
from tfmq.temporal.disturbance import Disturbance, disturbance
from tfmq.temporal.probe import probe


@dataclass(frozen=True)
class Outcome:
    """What quantization did.

    One report a unit, the disturbance of temporal features at the calibrated timesteps, measured inputs, and what stays in floating point.
    """

    units: tuple[UnitReport, ...]
    disturbance: Disturbance
    inputs: Mapping[str, InputErrors] = field(default_factory=dict)
    floating: tuple[Floating, ...] = ()


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
    foretold: Foretold | None = None,
    progress: Progress = silent,
) -> Prepared:
    """Do, or read back from the journal, all stages before the units; see `quantize_denoiser`."""
    resources.prepare()
    denoiser = sampler.denoiser
    denoiser.module.requires_grad_(False).eval()
    block = probe(denoiser, sampler.example())
    plan = make_plan(recipe, block.trace)

    def record() -> dict[str, Tensor]:
        check_time(sampler, recipe, plan, block, resources)
        check_room(sampler, recipe, store.directory.parent)
        if foretold is not None:
            foretold(calibration_seconds(sampler, recipe, plan, block, resources))
        store.clear()
        record_calibration(sampler, recipe, block, store, seed=seed, helpers=helpers, progress=progress)
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
    for embedding in calibrated_embeddings(denoiser.module).values():
        # Round embeddings before anything learns, so that learning makes up for their error.
        settle(embedding)
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


def reconstruct_alone(
    sampler: Sampler,
    recipe: Recipe,
    prepared: Prepared,
    number: int,
    *,
    seed: int,
    store: CalibrationStore,
    resources: Resources = UNLIMITED,
    advance: Advance,
) -> dict[str, Tensor]:
    """Reconstruct one unit that waits for no other, by its number; return what the journal keeps of it."""
    unit, denoiser = prepared.units[number], sampler.denoiser
    config = {"interval": recipe.calibration.interval, "seed": stage_seed(seed, unit.name), "resources": resources, "advance": advance}
    report = reconstructed(denoiser, unit, store, Upstream(None), prepared.steps, recipe.rounding, recipe.learning, **config)  # type: ignore[arg-type]
    layers = calibrated_layers(denoiser.module)
    return unit_result(report, {name: layers[name] for name in unit.layers})


def quantize_denoiser(
    sampler: Sampler,
    recipe: Recipe,
    *,
    seed: int,
    store: CalibrationStore,
    journal: Journal,
    helpers: Helpers | None = None,
    resources: Resources = UNLIMITED,
    foretold: Foretold | None = None,
    progress: Progress = silent,
    began: float | None = None,
) -> Outcome:
    """Quantize the sampler's denoiser in place by `recipe`; afterwards it holds packed layers only.

    The stages are journalled: with a journal of an interrupted run, finished stages are read back, and the result is the same to the byte.
    `helpers` do what they can ahead of this process: the trajectory, and units that do not wait for each other.
    `foretold` is told about how many seconds the stages before the units take, before they begin.
    A budget of time counts from `began`, a value of `time.perf_counter`, else from now.
    """
    began = time.perf_counter() if began is None else began
    denoiser = sampler.denoiser
    given = {"helpers": helpers, "resources": resources, "foretold": foretold, "progress": progress}
    prepared = prepare_units(sampler, recipe, seed=seed, store=store, journal=journal, **given)  # type: ignore[arg-type]
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
    disturbed = disturbance(steps.timesteps, prepared.full, quantized_features(block, steps, block.features))
    return Outcome(reports, disturbed, prepared.inputs, floating(denoiser.module, block.trace.quantizable))
