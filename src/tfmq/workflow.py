"""The order of quantization: probe, calibrate, fit ranges, temporal block, units, pack. Nothing else knows it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import torch
from torch import Tensor

from tfmq.calibration.choice import InputErrors, choose_inputs
from tfmq.calibration.ranges import collect, fit_site
from tfmq.calibration.replay import Upstream
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
from tfmq.reconstruction.solvers import work
from tfmq.reconstruction.tiar import full_features, reconstruct_temporal
from tfmq.reconstruction.unit import UnitReport, reconstruct_unit, settle
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


def stage_seed(seed: int, name: str) -> int:
    """Return the seed of a stage: its own, so that the order and the number of stages before it do not matter."""
    return crc32(f"{name} {seed}".encode())


def record_calibration(sampler: Sampler, recipe: Recipe, store: CalibrationStore, *, seed: int, progress: Progress) -> None:
    """Run the sampler in full precision and store every denoiser call."""
    config = recipe.calibration
    starts = range(0, config.samples, config.batch_size)
    with progress("calibration: sampling", len(starts) * config.steps) as advance:

        def sink(inputs: Inputs) -> None:
            store.append(inputs)
            advance()

        with recorded_calls(sampler.denoiser, sink):
            for start in starts:
                indices = range(start, min(start + config.batch_size, config.samples))
                sampler.run(indices, steps=config.steps, seed=stage_seed(seed, "calibration"))


def fit_activations(sampler: Sampler, plan: Plan, steps: StepContext, store: CalibrationStore, *, progress: Progress) -> dict[str, Tensor]:
    """Fit every activation quantizer on the full-precision trajectory; return the fitted tensors."""
    module = sampler.denoiser.module
    sites = activation_sites(module)
    if not sites:
        return {}
    methods = {f"{name}.input_quantizer": layer.input.ranges for name, layer in plan.layers.items() if layer.input}
    methods |= {owner: quantizer.ranges for owner, (_, quantizer) in plan.products.items() if quantizer}
    with progress("calibration: activation ranges", len(store) + len(sites)) as advance, precision(module, weights="full", inputs="quantized"):
        statistics = collect(sampler.denoiser, sites, steps, store, calls=len(store), advance=advance)
        for name, quantizer in sites.items():
            if name in statistics:
                fit_site(quantizer, statistics[name], method=methods.get(name) or methods[name.rpartition(".tfmq_products")[0]])  # type: ignore[arg-type]
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
    return _learned(layers)


def reconstruct_units(
    sampler: Sampler,
    units: Sequence[Unit],
    steps: StepContext,
    store: CalibrationStore,
    recipe: Recipe,
    *,
    seed: int,
    journal: Journal,
    progress: Progress,
) -> tuple[UnitReport, ...]:
    """Reconstruct the units in execution order, each on inputs from the quantized network so far; journal each."""
    module, layers = sampler.denoiser.module, calibrated_layers(sampler.denoiser.module)
    batches, upstream = StoredBatches(store, recipe.calibration.interval), Upstream(store.directory / "outputs")
    reports = []
    amounts = [work(recipe.rounding, recipe.learning, len(unit.layers)) for unit in units]
    # Each unit counts one more, for its calls.
    with progress("units: reconstruction", sum(amounts) + len(units)) as advance:
        for number, unit in enumerate(units):

            def compute(unit: Unit = unit) -> dict[str, Tensor]:
                report = reconstruct_unit(
                    sampler.denoiser,
                    unit,
                    batches,
                    upstream,
                    steps,
                    recipe.rounding,
                    recipe.learning,
                    seed=stage_seed(seed, unit.name),
                    advance=advance,
                )
                figures = torch.tensor([report.error_before, report.error_after, report.iterations, report.seconds], dtype=torch.float64)
                return {"report": figures, **_learned({name: layers[name] for name in unit.layers})}

            skipped = journal.done(f"unit_{number:04d}")
            tensors = journal.stage(f"unit_{number:04d}", compute)
            before, after, iterations, seconds = tensors.pop("report").tolist()
            reports.append(UnitReport(unit.name, before, after, int(iterations), seconds))
            _restore({name: layers[name] for name in unit.layers}, tensors)
            settle(module.get_submodule(unit.name))
            upstream.add(unit.name, module.get_submodule(unit.name))
            advance(1 + (amounts[number] if skipped else 0))
    return tuple(reports)


def _learned(layers: dict[str, CalibratedLayer]) -> dict[str, Tensor]:
    return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.learned().items()}


def _restore(layers: dict[str, CalibratedLayer], learned: dict[str, Tensor]) -> None:
    for name, layer in layers.items():
        layer.restore({key: learned[f"{name}.{key}"] for key in layer.learned()})


def quantize_denoiser(
    sampler: Sampler, recipe: Recipe, *, seed: int, store: CalibrationStore, journal: Journal, progress: Progress = silent
) -> Outcome:
    """Quantize the sampler's denoiser in place by `recipe`; afterwards it holds packed layers only.

    The stages are journalled: with a journal of an interrupted run, finished stages are read back, and the result is the same to the byte.
    """
    denoiser = sampler.denoiser
    denoiser.module.requires_grad_(False).eval()
    block = probe(denoiser, sampler.example())
    plan = make_plan(recipe, block.trace)

    def record() -> dict[str, Tensor]:
        store.clear()
        record_calibration(sampler, recipe, store, seed=seed, progress=progress)
        return {"calls": torch.tensor(len(store))}

    journal.stage("calibration", record)
    device = next(denoiser.module.parameters()).device
    steps = StepContext(store.timesteps()).to(device)
    prepare(denoiser.module, plan, steps, timestep=denoiser.timestep)
    full = full_features(block, steps.timesteps, block.features)
    ranges = journal.stage("activations", lambda: fit_activations(sampler, plan, steps, store, progress=progress))
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
        _restore(layers, journal.stage("temporal", lambda: maintain_temporal(block, layers, steps, store, recipe, seed=seed, progress=progress)))
        if recipe.temporal.maintenance != "block":
            scope = recipe.temporal.scope if recipe.temporal.maintenance == "selected" else None
            install_tables(block, {name: full[name] for name in block.cacheable}, steps, table_format=recipe.temporal.table, scope=scope)
    units = find_units(denoiser.module, [layer.name for layer in block.trace.layers if layer.name in plan.layers], exclude=maintained)
    reports = reconstruct_units(sampler, units, steps, store, recipe, seed=seed, journal=journal, progress=progress)
    pack_all(denoiser.module)
    return Outcome(reports, disturbance(steps.timesteps, full, quantized_features(block, steps, block.features)), inputs)
