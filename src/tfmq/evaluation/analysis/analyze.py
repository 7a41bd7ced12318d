"""The analysis of a quantized model beside its original, as one value."""

from dataclasses import dataclass

import torch
from torch import nn

from tfmq.calibration.trajectory import recorded_calls
from tfmq.evaluation.analysis.layers import LayerError, layer_errors
from tfmq.evaluation.analysis.ranges import Ranges, temporal_ranges
from tfmq.evaluation.analysis.sensitivity import TEMPORAL, Part, Sensitivity, sensitivity
from tfmq.evaluation.deviation import Trajectory, deviation, follow, latent_error, summarized
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import STEPS
from tfmq.nn.temporal import SkippedLayer, stock_name
from tfmq.progress import Progress, silent
from tfmq.reconstruction.units import find_units
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.disturbance import Disturbance

# Calls that sensitivity is measured on, spread over the trajectory.
CALLS = 8


@dataclass(frozen=True)
class Analysis:
    """Disturbance of temporal features, ranges of temporal layers, the trajectory, sensitivity of units, errors of layers."""

    disturbance: Disturbance
    ranges: Ranges
    trajectory: Trajectory
    sensitivity: Sensitivity
    layers: tuple[LayerError, ...]


def _parts(module: nn.Module, block: TemporalBlock, quantized: nn.Module) -> tuple[Part, ...]:
    """Return the temporal layers and the units, each with those of its layers that are quantized."""
    packed = {stock_name(quantized, name) for name in packed_layers(quantized)}
    temporal = [layer.name for layer in block.trace.temporal]
    names = [layer.name for layer in block.trace.layers]
    parts = [Part(TEMPORAL, tuple(name for name in temporal if name in packed))]
    units = find_units(module, names, exclude=temporal)
    parts += [Part(unit.name, tuple(name for name in unit.layers if name in packed)) for unit in units]
    return tuple(part for part in parts if part.layers)


@torch.no_grad()
def analyze(reference: Sampler, quantized: Sampler, *, num_images: int = 4, steps: int, seed: int = 0, progress: Progress = silent) -> Analysis:
    """Analyse a quantized model on the trajectories of a few images.

    Raises:
        ValueError: the models do not belong together, or the reference is quantized itself.
        SamplingError: a model draws no images.
    """
    disturbed = temporal_disturbance(reference, quantized.denoiser.module)
    module, twin = reference.denoiser.module, quantized.denoiser.module
    block = TemporalBlock(reference.denoiser, reference.example())
    indices = range(num_images)
    calls: list[Inputs] = []
    with progress("trajectories", 2) as advance:
        with recorded_calls(reference.denoiser, calls.append):
            full = follow(reference, indices, steps=steps, seed=seed)
        advance()
        low = follow(quantized, indices, steps=steps, seed=seed)
        advance()
    chosen = [calls[index] for index in sorted({round(i * (len(calls) - 1) / max(1, CALLS - 1)) for i in range(CALLS)})]
    parts = _parts(module, block, twin)
    # A skipped layer computes nothing while every feature comes from its table: it has no error of its own.
    names = [name for part in parts for name in part.layers if not isinstance(twin.get_submodule(name), SkippedLayer)]
    return Analysis(
        disturbed,
        temporal_ranges(block, getattr(twin, STEPS).timesteps),
        summarized(full.timesteps, deviation(full, low), latent_error(full, low)),
        sensitivity(reference.denoiser, quantized.denoiser, parts, chosen, progress=progress),
        layer_errors(reference.denoiser, quantized.denoiser, names, chosen),
    )
