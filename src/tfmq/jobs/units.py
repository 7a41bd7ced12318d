"""The stage of the units: one of them, and all in execution order."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import isnan, nan

import torch
from torch import Tensor

from tfmq.calibration.readers import called_once, find_readers
from tfmq.calibration.replay import Upstream
from tfmq.calibration.spool import Spool
from tfmq.jobs.forecast import units_seconds
from tfmq.jobs.job import Job, Work
from tfmq.jobs.pace import Noted, Pace, paced
from tfmq.jobs.stage import Kept, Tensors, nothing
from tfmq.jobs.temporal import maintained
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers
from tfmq.progress import Advance
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, work_amount
from tfmq.reconstruction.unit import (
    Feed,
    UnitReport,
    full_precision,
    learned,
    reconstruct_unit,
    restore,
    settle,
    unseen,
)
from tfmq.reconstruction.units import Unit, find_units


def list_units(job: Job, work: Work) -> None:
    """Find the units, without the layers that the temporal block's stage answered for."""
    names = [layer.name for layer in work.block.trace.layers if layer.name in work.plan.layers]
    work.units = find_units(job.denoiser.module, names, exclude=list(maintained(job, work)))


def unit_file(number: int) -> str:
    """Return the journal's name of a unit."""
    return f"unit_{number:04d}"


def unit_alone(number: int, *, advance: Advance) -> Kept[None]:
    """Return the stage of one unit that waits for no other, as helpers do it: its model stays as it is."""
    return Kept(unit_file(number), partial(_computed_alone, number, advance), nothing)


def _computed_alone(number: int, advance: Advance, job: Job, work: Work) -> Tensors:
    unit = work.units[number]
    report = _reconstructed(job, work, unit, Upstream(None), job.recipe.learning, advance)
    layers = calibrated_layers(job.denoiser.module)
    return _result(report, {name: layers[name] for name in unit.layers})


def reconstruct_units(job: Job, work: Work) -> None:
    """Reconstruct the units in execution order, each on inputs as the recipe's rounding has them; journal
    each. Those that keep their nearest codes are not run.

    Where no unit waits for another, helpers leave units in the journal, in any order.
    """
    module, units = job.denoiser.module, work.units
    if job.recipe.rounding.solver == "nearest":
        for unit in units:
            settle(module.get_submodule(unit.name))
        work.reports = tuple(unseen(unit.name) for unit in units)
        return
    layers = calibrated_layers(module)
    _check_memory(job, units, layers)
    upstream, pace, reports = _upstream(job, units), paced(job, work), []
    _foretell(job, units)
    amounts = [work_amount(job.recipe.rounding, job.recipe.learning, len(unit.layers)) for unit in units]
    # Each unit counts one more, for its calls.
    with job.progress("units: reconstruction", sum(amounts) + len(units)) as advance:
        helped = set()
        for number in _helped(job, units):
            helped.add(number)
            advance(amounts[number])
        for number, unit in enumerate(units):
            skipped = job.has(unit_file(number)) and number not in helped
            compute = partial(_computed, number, upstream, pace, Noted(advance))
            reports.append(Kept(unit_file(number), compute, partial(_take_codes, unit))(job, work))
            upstream.add(unit.name, module.get_submodule(unit.name))
            advance(1 + (amounts[number] if skipped else 0))
    work.reports = tuple(reports)


def _check_memory(job: Job, units: Sequence[Unit], layers: Mapping[str, CalibratedLayer]) -> None:
    """Refuse units whose solver needs more memory than the job may take."""
    rounding = job.recipe.rounding
    for unit in units:
        job.resources.check(
            unit.name, SOLVERS[rounding.solver].memory([layers[name] for name in unit.layers], rounding)
        )


def _upstream(job: Job, units: Sequence[Unit]) -> Upstream:
    """Return the store of outputs of the units before a unit, with who reads them in full precision."""
    names = [unit.name for unit in units]
    with full_precision(job.denoiser.module):
        example = job.store.read(0)
        readers, once = find_readers(job.denoiser, names, example), called_once(job.denoiser, names, example)
    return Upstream(job.store.directory / "outputs", readers=readers, once=once)


def _left(job: Job, units: Sequence[Unit]) -> list[int]:
    """Return the numbers of the units that are not in the journal."""
    return [number for number in range(len(units)) if not job.has(unit_file(number))]


def _foretell(job: Job, units: Sequence[Unit]) -> None:
    """Say about what the units that are left take, where no budget of time decides that."""
    waiting = [units[number] for number in _left(job, units)]
    if job.foretold is not None and waiting and job.resources.time_budget is None:
        job.foretold(units_seconds(job, waiting), "units")


def _helped(job: Job, units: Sequence[Unit]) -> Iterator[int]:
    """Let helpers reconstruct what they can ahead; yield the number of each unit that is in the journal
    then.
    """
    if job.helpers is not None and job.recipe.rounding.inputs == "full":
        yield from job.helpers.reconstruct(_left(job, units))


def _computed(number: int, upstream: Upstream, pace: Pace, noted: Noted, job: Job, work: Work) -> Tensors:
    """Reconstruct a unit by what its pace leaves it, and count the rest of its work as done."""
    unit, layers = work.units[number], calibrated_layers(job.denoiser.module)
    granted, report = pace.learning(number), unseen(unit.name)
    if granted is not None:
        report = _reconstructed(job, work, unit, upstream, granted, noted)
        pace.took(number, report, noted.moments)
    noted.advance(work_amount(job.recipe.rounding, job.recipe.learning, len(unit.layers)) - noted.amount)
    return _result(report, {name: layers[name] for name in unit.layers})


def _take_codes(unit: Unit, job: Job, work: Work, found: Tensors) -> UnitReport:
    """Let a unit compute with the codes that were found; return its report."""
    layers = calibrated_layers(job.denoiser.module)
    report = _report(unit.name, found.pop("report"))
    restore({name: layers[name] for name in unit.layers}, found)
    settle(job.denoiser.module.get_submodule(unit.name))
    return report


def _reconstructed(
    job: Job, work: Work, unit: Unit, upstream: Upstream, learning: Learning, advance: Advance
) -> UnitReport:
    spool = Spool(job.store.directory / "calls", job.resources.captured)
    feed = Feed(job.batches, upstream, work.steps, spool)
    return reconstruct_unit(
        job.denoiser, unit, feed, job.recipe.rounding, learning, seed=job.seed_of(unit.name), advance=advance
    )


def _result(report: UnitReport, layers: Mapping[str, CalibratedLayer]) -> Tensors:
    """Return what the journal keeps of a unit: what was learned, and its figures as `report`; NaN is no
    error.
    """
    errors = [nan if error is None else error for error in (report.error_before, report.error_after)]
    figures = torch.tensor([*errors, report.iterations, report.seconds], dtype=torch.float64)
    return {"report": figures, **learned(layers)}


def _report(name: str, figures: Tensor) -> UnitReport:
    before, after, iterations, seconds = figures.tolist()
    return UnitReport(
        name, None if isnan(before) else before, None if isnan(after) else after, int(iterations), seconds
    )
