"""Reconstruct one unit: roundings that make its output that of the full-precision model."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.calibration.capture import UnitCalls, capture
from tfmq.models.denoiser import Denoiser, Inputs, output_tensors
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.swap import precision
from tfmq.nn.temporal import without_tables
from tfmq.progress import Advance
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning, learn_rounding
from tfmq.reconstruction.units import Unit


@dataclass(frozen=True)
class UnitReport:
    """Mean squared error of a unit's outputs with nearest and with learned rounding, and the time it took."""

    name: str
    error_before: float
    error_after: float
    seconds: float


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Return the squared error, summed over channels (the last axis of tokens `[B, N, C]`, else axis 1) and averaged over the rest."""
    return (output - target).square().sum(dim=-1 if output.ndim == 3 else 1).mean()


def capture_unit(denoiser: Denoiser, unit: nn.Module, batches: Iterable[Inputs]) -> UnitCalls:
    """Return the unit's inputs in the quantized network so far, with its outputs in the full-precision network."""
    with precision(denoiser.module, weights="full", inputs="full"), without_tables(denoiser.module):
        targets = capture(denoiser, unit, batches).outputs
    calls = capture(denoiser, unit, batches)
    return UnitCalls(calls.args, calls.kwargs, calls.timestep, targets)


def _unit_loss(unit: nn.Module, calls: UnitCalls, steps: StepContext) -> Callable[[UnitCalls], Tensor]:
    def loss(batch: UnitCalls) -> Tensor:
        with steps.at(batch.timestep):
            outputs = output_tensors(unit(*batch.args, **batch.kwargs))
            return torch.stack([squared_error(output, target) for output, target in zip(outputs, batch.outputs, strict=True)]).sum()

    return loss


@torch.no_grad()
def _mean_error(loss: Callable[[UnitCalls], Tensor], calls: UnitCalls, batch_size: int) -> float:
    parts = torch.arange(len(calls)).split(batch_size)
    return sum(float(loss(calls.rows(part))) * len(part) for part in parts) / len(calls)


def reconstruct_unit(
    denoiser: Denoiser,
    unit: Unit,
    batches: Iterable[Inputs],
    steps: StepContext,
    config: Learning,
    *,
    seed: int,
    advance: Advance,
) -> UnitReport:
    """Learn the roundings of `unit` on `batches` and leave it quantized.

    `steps` gives each sample its own timestep. The layers of the unit end with quantized weights and, where they have a quantizer for
    them, quantized inputs.
    """
    began = time.perf_counter()
    module = denoiser.module.get_submodule(unit.name)
    calls = capture_unit(denoiser, module, batches)
    settle(module)
    loss = _unit_loss(module, calls, steps)
    layers: dict[str, CalibratedLayer] = {name: denoiser.module.get_submodule(name) for name in unit.layers}  # type: ignore[misc]

    def drawn(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(calls), (config.batch_size,), generator=generator)
        return loss(calls.rows(index))

    before = _mean_error(loss, calls, config.batch_size)
    learn_rounding(layers, drawn, config, seed=seed, advance=advance)
    after = _mean_error(loss, calls, config.batch_size)
    return UnitReport(unit.name, before, after, time.perf_counter() - began)


def settle(module: nn.Module) -> None:
    """Make the layers and products below `module` compute with quantized weights and inputs from now on."""
    for child in module.modules():
        if isinstance(child, CalibratedLayer):
            child.weight_precision = child.input_precision = "quantized"
        elif isinstance(child, ProductQuantizers):
            child.enabled = True
