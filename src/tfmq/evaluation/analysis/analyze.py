"""The analysis of a quantized model beside its original, as one value."""

from dataclasses import dataclass

import torch
from torch import nn

from tfmq.calibration.trajectory import recorded_calls
from tfmq.evaluation.analysis.accumulation import Accumulation, accumulated, scheduler_of, walked
from tfmq.evaluation.analysis.layers import LayerError, layer_errors
from tfmq.evaluation.analysis.ranges import Ranges, temporal_ranges
from tfmq.evaluation.analysis.sensitivity import TEMPORAL, LayerGroup, Sensitivity, sensitivity
from tfmq.evaluation.deviation import Trajectory, deviation, follow, latent_error, summarized
from tfmq.evaluation.outlay import drawing
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import steps_of
from tfmq.nn.temporal import SkippedLayer, stock_name
from tfmq.progress import Progress, silent
from tfmq.reconstruction.units import find_units
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.disturbance import Disturbance

# Number of calls that sensitivity is measured on, spread over the trajectory.
CALLS = 8


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is analysed: `num_images` trajectories, `calls` of them and `parts` of the model (None: all),
    both spread evenly.
    """

    num_images: int
    calls: int = CALLS
    parts: int | None = None


THOROUGH = Extent(num_images=4)
# Takes a minute on a small model.
QUICK = Extent(num_images=1, calls=2, parts=8)


@dataclass(frozen=True)
class Analysis:
    """Disturbance of temporal features, ranges of temporal layers, the trajectory, sensitivity of units,
    errors of layers, how errors add up.

    `of_parts` is the number of parts that the model has; those whose sensitivity and layers were looked at
    are in `sensitivity`.
    """

    disturbance: Disturbance
    ranges: Ranges
    trajectory: Trajectory
    sensitivity: Sensitivity
    layers: tuple[LayerError, ...]
    of_parts: int
    accumulation: Accumulation | None


def _parts(module: nn.Module, block: TemporalBlock, quantized: nn.Module) -> tuple[LayerGroup, ...]:
    """Return the temporal layers and the units, each with those of its layers that are quantized."""
    packed = {stock_name(quantized, name) for name in packed_layers(quantized)}
    temporal = [layer.name for layer in block.trace.temporal]
    names = [layer.name for layer in block.trace.layers]
    parts = [LayerGroup(TEMPORAL, tuple(name for name in temporal if name in packed))]
    units = find_units(module, names, exclude=temporal)
    parts += [LayerGroup(unit.name, tuple(name for name in unit.layers if name in packed)) for unit in units]
    return tuple(part for part in parts if part.layers)


def _spread(count: int, wanted: int | None) -> list[int]:
    """Return at most `wanted` of the numbers 0 to `count - 1`, evenly spread, the first and the last among
    them.

    >>> _spread(9, 3), _spread(2, 8), _spread(3, None), _spread(5, 1)
    ([0, 4, 8], [0, 1], [0, 1, 2], [0])
    """
    wanted = count if wanted is None else min(wanted, count)
    return sorted({round(number * (count - 1) / max(1, wanted - 1)) for number in range(wanted)})


@torch.no_grad()
def expected_seconds(reference: Sampler, quantized: Sampler, *, extent: Extent, steps: int) -> float:
    """Return about what an analysis takes, by the time of a few calls."""
    full, low = (
        drawing(sampler, extent.num_images, steps=steps, batch_size=extent.num_images)
        for sampler in (reference, quantized)
    )
    block = TemporalBlock(reference.denoiser, reference.example())
    parts = len(
        _spread(len(_parts(reference.denoiser.module, block, quantized.denoiser.module)), extent.parts)
    )
    # Each part runs in the full-precision model; its layers, and those of all parts once more by themselves,
    # as the quantized one computes.
    runs = extent.calls * ((parts + 2) * max(full.call_seconds, low.call_seconds) + 2 * low.call_seconds)
    return full.seconds + 2 * low.seconds + runs


@torch.no_grad()
def analyze(
    reference: Sampler,
    quantized: Sampler,
    *,
    extent: Extent = THOROUGH,
    steps: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Analysis:
    """Analyse a quantized model on the trajectories of a few images.

    Temporal features are looked at whole: at every calibrated timestep.

    Raises:
        ValueError: the models do not belong together, or the reference is quantized itself.
        SamplingError: a model draws no images.
    """
    disturbed = temporal_disturbance(reference, quantized.denoiser.module)
    module, twin = reference.denoiser.module, quantized.denoiser.module
    block = TemporalBlock(reference.denoiser, reference.example())
    indices = range(extent.num_images)
    calls: list[Inputs] = []
    with progress("trajectories", 3) as advance:
        with recorded_calls(reference.denoiser, calls.append), walked(reference) as walk:
            full = follow(reference, indices, steps=steps, seed=seed)
        advance()
        with walked(quantized) as alone:
            low = follow(quantized, indices, steps=steps, seed=seed)
        advance()
        added = accumulated(
            quantized, (walk, alone), scheduler_of(reference), indices, steps=steps, seed=seed
        )
        advance()
    chosen = [calls[index] for index in _spread(len(calls), extent.calls)]
    known = _parts(module, block, twin)
    parts = [known[index] for index in _spread(len(known), extent.parts)]
    # A skipped layer computes nothing while every feature comes from its table: it has no error of its own.
    names = [
        name
        for part in parts
        for name in part.layers
        if not isinstance(twin.get_submodule(name), SkippedLayer)
    ]
    return Analysis(
        disturbed,
        temporal_ranges(block, steps_of(twin).timesteps),
        summarized(full.timesteps, deviation(full, low), latent_error(full, low)),
        sensitivity(reference.denoiser, quantized.denoiser, parts, chosen, progress=progress),
        layer_errors(reference.denoiser, quantized.denoiser, names, chosen),
        len(known),
        added,
    )
