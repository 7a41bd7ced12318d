"""Each quantized layer by itself: how far its output is off on full-precision inputs, and how long it
takes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.swap import steps_of
from tfmq.numerics.errors import relative_error
from tfmq.quantizers.steps import StepContext


@dataclass(frozen=True)
class LayerError:
    """Mean relative error of a layer's output on full-precision inputs, and median milliseconds of a call: in
    full precision and quantized.
    """

    name: str
    error: float
    full_ms: float
    quantized_ms: float


def _timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    began = time.perf_counter()
    result = call()
    return result, 1e3 * (time.perf_counter() - began)


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

    def compare(name: str) -> Callable[..., None]:
        twin = quantized.module.get_submodule(name)

        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            _, full = _timed(lambda: type(layer).forward(layer, *args, **kwargs))
            other, low = _timed(lambda: twin(*args, **kwargs))
            seen[name].append((float(relative_error(output.flatten(1), other.flatten(1)).mean()), full, low))

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(
                denoiser.module.get_submodule(name)
                .register_forward_hook(compare(name), with_kwargs=True)
                .remove
            )
        for call in calls:
            with steps.at(call.timestep):
                denoiser(call)
    found = []
    for name, rows in seen.items():
        if rows:
            errors, full, low = zip(*rows, strict=True)
            found.append(LayerError(name, mean(errors), median(full), median(low)))
    return tuple(found)
