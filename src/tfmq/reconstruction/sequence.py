"""The units of a denoiser one after the other, each on inputs from the network quantized so far."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tfmq.calibration.readers import find_readers
from tfmq.calibration.replay import Upstream
from tfmq.calibration.spool import Spool
from tfmq.calibration.store import CalibrationStore, StoredBatches
from tfmq.models.denoiser import Denoiser
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers
from tfmq.progress import Progress
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.resources import Resources
from tfmq.reconstruction.solvers import SOLVERS, Rounding, work
from tfmq.reconstruction.unit import UnitReport, full_precision, reconstruct_unit, settle
from tfmq.reconstruction.units import Unit
from tfmq.storage.journal import Journal


def learned(layers: Mapping[str, CalibratedLayer]) -> dict[str, Tensor]:
    """Return what reconstruction sets in `layers`."""
    return {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.learned().items()}


def restore(layers: Mapping[str, CalibratedLayer], tensors: Mapping[str, Tensor]) -> None:
    """Set in `layers` what `learned` returned."""
    for name, layer in layers.items():
        layer.restore({key: tensors[f"{name}.{key}"] for key in layer.learned()})


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
    journal: Journal,
    progress: Progress,
) -> tuple[UnitReport, ...]:
    """Reconstruct the units in execution order on every `interval`-th timestep of `store`; journal each.

    `seeds` has one for each unit.
    """
    module, layers = denoiser.module, calibrated_layers(denoiser.module)
    for unit in units:
        resources.check(unit.name, SOLVERS[rounding.solver].memory([layers[name] for name in unit.layers], rounding))
    with full_precision(module):
        readers = find_readers(denoiser, [unit.name for unit in units], store.read(0))
    batches, upstream = StoredBatches(store, interval), Upstream(store.directory / "outputs", readers=readers)
    reports = []
    amounts = [work(rounding, learning, len(unit.layers)) for unit in units]
    # Each unit counts one more, for its calls.
    with progress("units: reconstruction", sum(amounts) + len(units)) as advance:
        for number, unit in enumerate(units):

            def compute(unit: Unit = unit) -> dict[str, Tensor]:
                spool = Spool(store.directory / "calls", resources.captured)
                seed = seeds[unit.name]
                report = reconstruct_unit(denoiser, unit, batches, upstream, steps, rounding, learning, seed=seed, advance=advance, spool=spool)
                figures = torch.tensor([report.error_before, report.error_after, report.iterations, report.seconds], dtype=torch.float64)
                return {"report": figures, **learned({name: layers[name] for name in unit.layers})}

            skipped = journal.done(f"unit_{number:04d}")
            tensors = journal.stage(f"unit_{number:04d}", compute)
            before, after, iterations, seconds = tensors.pop("report").tolist()
            reports.append(UnitReport(unit.name, before, after, int(iterations), seconds))
            restore({name: layers[name] for name in unit.layers}, tensors)
            settle(module.get_submodule(unit.name))
            upstream.add(unit.name, module.get_submodule(unit.name))
            advance(1 + (amounts[number] if skipped else 0))
    return tuple(reports)
