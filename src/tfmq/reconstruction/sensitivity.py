"""Measure how much each unit disturbs the output and predict what it will cost. A budget of time is divided
by these two.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.submodules import named
from tfmq.nn.swap import precision
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.reconstruction.budget import Cost
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, Rounding
from tfmq.reconstruction.unit import full_precision
from tfmq.reconstruction.units import Unit
from tfmq.stopwatch import clock, timed

# Number of samples of a measured call.
ROWS = 8
# Forward passes that a unit costs with any solver: one to capture its calls and one to measure its error. The
# error before rounding costs a learning solver another pass; a closed-form solver measures it on the way.
RUNS = 2
# Cost of one learning step: forward passes of its batch, and seconds for each weight.
STEP_RUNS, SECONDS_A_WEIGHT = 4.0, 4e-8


@torch.no_grad()
def output_sensitivity(denoiser: Denoiser, units: Sequence[Unit], calls: Sequence[Inputs]) -> Tensor:
    """Return the mean squared error of the denoiser's output with each unit alone quantized, its codes the
    nearest, `[U]`.
    """
    errors = torch.zeros(len(units), dtype=torch.float64)
    with full_precision(denoiser.module):
        for call in calls:
            expected = denoiser(call)
            found = [_error(denoiser, unit, call, expected) for unit in units]
            errors += torch.tensor(found, dtype=torch.float64)
    return errors / max(1, len(calls))


def _error(denoiser: Denoiser, unit: Unit, call: Inputs, expected: Tensor) -> float:
    with precision(denoiser.module.get_submodule(unit.name), weights="quantized", inputs="quantized"):
        return float((denoiser(call) - expected).double().square().mean())


@contextmanager
def _parts_timed(modules: dict[str, nn.Module]) -> Iterator[dict[str, float]]:
    """Add up the seconds of calls of `modules`."""
    seconds, began = dict.fromkeys(modules, 0.0), dict.fromkeys(modules, 0.0)

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return clock()

    def before(call: ModuleCall) -> None:
        began[call.name] = now()

    def after(call: ModuleCall) -> None:
        seconds[call.name] += now() - began[call.name]

    with all_watched(modules, before=before, after=after):
        yield seconds


def products_a_second() -> float:
    """Return how many multiplications and additions of float64 matrices this machine does in a second."""
    matrix = torch.ones(384, 384, dtype=torch.float64)
    _, seconds = timed(lambda: matrix @ matrix)
    return 2 * 384**3 / max(seconds, 1e-6)


def closed_form_products(weight: Tensor, samples: int, rounding: Rounding) -> float:
    """Return about how many operations a layer's solution in closed form takes: moments, factors, feedback,
    sweeps.
    """
    rows, columns = weight.shape[0], weight[0].numel()
    moments = 2.0 * samples * rounding.positions * columns * (columns + rows)
    return moments + 4.0 * columns**3 + (4.0 + 4.0 * rounding.sweeps) * rows * columns**2


@torch.no_grad()
def predicted_costs(
    denoiser: Denoiser,
    units: Sequence[Unit],
    call: Inputs,
    *,
    samples: int,
    rounding: Rounding,
    learning: Learning,
) -> dict[str, Cost]:
    """Return what each unit will cost for `samples` samples, from the time of its part in one call, its sizes
    and this machine's speed.
    """
    solver, rate = SOLVERS[rounding.solver], products_a_second()
    with full_precision(denoiser.module):
        denoiser(call)
        with _parts_timed(named(denoiser.module, [unit.name for unit in units])) as seconds:
            denoiser(call)
    costs = {}
    for unit in units:
        layers: list[CalibratedLayer] = [denoiser.module.get_submodule(name) for name in unit.layers]  # type: ignore[misc]
        a_sample = seconds[unit.name] / len(call)
        runs = RUNS + (1 + len(layers) if solver.runs_full else 1)
        solved = (
            sum(closed_form_products(layer.weight, samples, rounding) for layer in layers) / rate
            if solver.runs_full
            else 0.0
        )
        weights = sum(layer.weight.numel() for layer in layers)
        costs[unit.name] = Cost(
            samples * a_sample * runs + solved,
            STEP_RUNS * learning.batch_size * a_sample + SECONDS_A_WEIGHT * weights,
        )
    return costs
