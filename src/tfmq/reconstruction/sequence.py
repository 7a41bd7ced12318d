"""The units of a denoiser: one of them, and all in execution order."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isnan, nan

import torch
from torch import Tensor

from tfmq.calibration.readers import called_once, find_readers
from tfmq.calibration.replay import Upstream
from tfmq.calibration.spool import Spool
from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.models.denoiser import Denoiser
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers
from tfmq.progress import Advance, Progress
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.pace import Noted, Pace, Unhurried, paced
from tfmq.reconstruction.resources import Resources
from tfmq.reconstruction.solvers import SOLVERS, Rounding, work
from tfmq.reconstruction.unit import UnitReport, full_precision, reconstruct_unit, settle
from tfmq.reconstruction.units import Unit
from tfmq.storage.journal import Journal

# Takes numbers of units, and yields the numbers of those that are done.
Ahead = Callable[[Sequence[int]], Iterator[int]]


def learned(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return what reconstruction sets in `layers`."""
    return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.learned().items()}


def restore(layers: Mapping[str, CalibratedLayer], tensors: Mapping[str, Tensor]) -> None:
    """Set in `layers` what `learned` returned."""
    for name, layer in layers.items():
        layer.restore({key: tensors[f"{name}.{key}"] for key in layer.learned()})


def unit_file(number: int) -> str:
    """Return the journal's name of a unit."""
    return f"unit_{number:04d}"


def reconstructed(
    denoiser: Denoiser,
    unit: Unit,
    store: CalibrationStore,
    upstream: Upstream,
    steps: StepContext,
    rounding: Rounding,
    learning: Learning,
    *,
    interval: int,
    seed: int,
    resources: Resources,
    advance: Advance,
) -> UnitReport:
    """Reconstruct one unit on every `interval`-th timestep of `store`."""
    spool = Spool(store.directory / "calls", resources.captured)
    return reconstruct_unit(
        denoiser, unit, StoredBatches(store, interval), upstream, steps, rounding, learning, seed=seed, advance=advance, spool=spool
    )


def unit_result(report: UnitReport, layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return what the journal keeps of a unit: what was learned, and its figures as `report`."""
    return {"report": _figures(report), **learned(layers)}


def reconstruct_units(
    denoiser: Denoiser,
    units: Sequence[Unit],
    steps: StepContext,
    store: CalibrationStore,
    rounding: Rounding,
    learning: Learning,
    *,
    interval: int,
    seeds: Mapping[str, int],
    resources: Resources,
    elapsed: Callable[[], float],
    journal: Journal,
    ahead: Ahead | None,
    progress: Progress,
) -> tuple[UnitReport, ...]:
    """Reconstruct the units in execution order, each on inputs as `rounding` has them; journal each.

    `seeds` has one for each unit; `elapsed` tells the seconds that the job has taken, of which `resources` may limit the number. Where no unit
    waits for another, `ahead` leaves those that it is given in the journal, in any order.
    """
    module, layers = denoiser.module, calibrated_layers(denoiser.module)
    for unit in units:
        resources.check(unit.name, SOLVERS[rounding.solver].memory([layers[name] for name in unit.layers], rounding))
    with full_precision(module):
        names, example = [unit.name for unit in units], store.read(0)
        readers, once = find_readers(denoiser, names, example), called_once(denoiser, names, example)
    upstream = Upstream(store.directory / "outputs", readers=readers, once=once)
    pace: Pace = Unhurried(learning)
    if resources.time_budget is not None:
        budget = {"interval": interval, "seconds": resources.time_budget, "elapsed": elapsed, "journal": journal}
        pace = paced(denoiser, units, store, rounding, learning, **budget)  # type: ignore[arg-type]
    reports = []
    amounts = [work(rounding, learning, len(unit.layers)) for unit in units]
    # Each unit counts one step more, for capturing its calls.
    with progress("units: reconstruction", sum(amounts) + len(units)) as advance:
        helped = set()
        if ahead is not None and rounding.inputs == "full":
            for number in ahead([number for number in range(len(units)) if not journal.done(unit_file(number))]):
                helped.add(number)
                advance(amounts[number])
        for number, unit in enumerate(units):
            own = {name: layers[name] for name in unit.layers}

            def compute(number: int = number, unit: Unit = unit, own: dict[str, CalibratedLayer] = own) -> dict[str, Tensor]:
                granted, noted = pace.learning(number), Noted(advance)
                report = UnitReport(unit.name, None, None, 0, 0.0)
                if granted is not None:
                    shared = {"interval": interval, "seed": seeds[unit.name], "resources": resources}
                    report = reconstructed(denoiser, unit, store, upstream, steps, rounding, granted, advance=noted, **shared)  # type: ignore[arg-type]
                    pace.took(number, report, noted.moments)
                advance(amounts[number] - noted.amount)
                return unit_result(report, own)

            skipped = journal.done(unit_file(number)) and number not in helped
            tensors = journal.stage(unit_file(number), compute)
            reports.append(_report(unit.name, tensors.pop("report")))
            restore(own, tensors)
            settle(module.get_submodule(unit.name))
            upstream.add(unit.name, module.get_submodule(unit.name))
            advance(1 + (amounts[number] if skipped else 0))
    return tuple(reports)


def _figures(report: UnitReport) -> Tensor:
    """Return a report as the journal keeps it: NaN is no error."""
    errors = [nan if error is None else error for error in (report.error_before, report.error_after)]
    return torch.tensor([*errors, report.iterations, report.seconds], dtype=torch.float64)


def _report(name: str, figures: Tensor) -> UnitReport:
    before, after, iterations, seconds = figures.tolist()
    return UnitReport(name, None if isnan(before) else before, None if isnan(after) else after, int(iterations), seconds)
