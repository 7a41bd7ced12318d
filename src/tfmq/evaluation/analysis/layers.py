"""Each quantized layer by itself: how far its output is off on full-precision inputs, how long it takes, and
how much of what it multiplies is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.operation import operand
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.submodules import named
from tfmq.nn.swap import steps_of
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.errors import relative_error
from tfmq.quantizers.steps import StepContext
from tfmq.stopwatch import timed


@dataclass(frozen=True)
class LayerError:
    """Mean relative error of a layer's output on full-precision inputs, median milliseconds of a call, in
    full precision and quantized, and the mean share of the codes of its input that stand for zero, which an
    engine for sparse operands need not multiply (SQ-DM, Fan et al., 2025, section 3); None for an input that
    is not quantized.
    """

    name: str
    error: float
    full_ms: float
    quantized_ms: float
    zeros: float | None = None


def _zeros(layer: PackedLayer, x: Tensor) -> float | None:
    """Return the share of zeros in an input as the layer quantizes it."""
    if layer.input_quantizer is None:
        return None
    return float((layer.input_quantizer(layer.transformed(x)) == 0).float().mean())


@torch.no_grad()
def layer_errors(
    denoiser: Denoiser, quantized: Denoiser, names: Sequence[str], calls: Sequence[Inputs]
) -> tuple[LayerError, ...]:
    """Hand every input that the layers `names` of the full-precision model see to their quantized twins as
    well.

    Times are of single calls on whatever the two models compute with; they show where time goes and are no
    benchmark.
    """
    steps: StepContext = steps_of(quantized.module)
    seen: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    zeros: dict[str, list[float]] = {name: [] for name in names}

    twins, packed = named(quantized.module, names), packed_layers(quantized.module)

    def compare(call: ModuleCall) -> None:
        name, layer, args, kwargs, output = call
        _, full = timed(lambda: type(layer).forward(layer, *args, **kwargs))
        other, low = timed(lambda: twins[name](*args, **kwargs))
        error = float(relative_error(output.flatten(1), other.flatten(1)).mean())
        seen[name].append((error, 1e3 * full, 1e3 * low))
        if (share := _zeros(packed[name], operand(args, kwargs))) is not None:
            zeros[name].append(share)

    with all_watched(named(denoiser.module, names), after=compare):
        for inputs in calls:
            with steps.at(inputs.timestep):
                denoiser(inputs)
    found = []
    for name, rows in seen.items():
        if rows:
            errors, full, low = zip(*rows, strict=True)
            share = mean(zeros[name]) if zeros[name] else None
            found.append(LayerError(name, mean(errors), median(full), median(low), share))
    return tuple(found)
