"""What to expect of integers on this machine, measured in seconds, before hours of calibration.

Each layer's shape is timed in float32 and in int8, which shows where time goes, and a step of the model in
float32 and of a copy whose layers compute on arbitrary grids: a step takes what layers take, and attention,
and calling them all.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.evaluation.cost.system import describe_machine
from tfmq.evaluation.shapes import SECONDS, ShapeTiming, Site, Total, sites_of, timed, total
from tfmq.evaluation.trial import trial
from tfmq.kernels.onednn import available
from tfmq.models.denoiser import Inputs
from tfmq.models.program import Trace
from tfmq.models.sampler import Sampler
from tfmq.models.trace import trace
from tfmq.nn.operation import weight_of
from tfmq.nn.swap import is_quantized
from tfmq.progress import Progress, silent
from tfmq.recipes.presets import scheme
from tfmq.recipes.recipe import Recipe
from tfmq.stopwatch import call_seconds, seconds_of

# A quick forecast spends so many seconds on shapes and on steps, and packs no copy of a model with more
# weights than this.
QUICK_SHAPES, QUICK_STEPS, QUICK_WEIGHTS = 20.0, 15.0, 50_000_000
# Number of turns of each model, and steps in a turn. The first step of a turn does not count, since the other
# model's weights are in the caches.
ROUNDS, RUN = 3, 4
# Seconds that packing one weight takes, for the estimate that is printed before the work.
PACKING = 2e-7


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The machine, the measured shapes from slow to fast, a step in float32 and in W8A8 by the torch backend,
    and weight bytes.

    `rest_ms` is the part of the float32 step outside the layers, `predicted_ms` the step of a model without
    calibration. `weight_bytes` are those in memory while a W8A8 model runs: packed codes and executable copy,
    against float32's. `instructions` that decide are in `machine`. `extrapolated` says in words what was not
    measured and how it was concluded; empty where everything was measured.
    """

    machine: Mapping[str, Any]
    batch: int
    shapes: tuple[ShapeTiming, ...]
    fp32_ms: float
    rest_ms: float
    predicted_ms: float | None
    speedup: float | None
    weight_bytes: Mapping[str, int]
    extrapolated: tuple[str, ...] = ()


def _steps(*calls: Callable[[], object], most: float) -> list[float]:
    """Return the median time of a step of each model in ms; runs of them take turns, in rounds that begin
    within `most` seconds.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + most
    for number in range(ROUNDS):
        if number and time.perf_counter() > end:
            break
        for call, found in zip(calls, seconds, strict=True):
            turn = RUN if time.perf_counter() < end else 2
            found += [call_seconds(call) for _ in range(turn)][1:]
    return [median(found) * 1e3 for found in seconds]


def _check_model(module: nn.Module) -> None:
    """Refuse a model that a forecast cannot be made of."""
    if is_quantized(module):
        raise ValueError(
            "the model is quantized already; measure it with tfmq bench, or pass the full-precision one"
        )
    if next(module.parameters()).device.type != "cpu":
        raise ValueError("the forecast is for the CPU, whose integer operators it measures")


def _weights(module: nn.Module, traced: Trace) -> list[Tensor]:
    """Return the weight of each traced layer."""
    return [weight_of(module.get_submodule(layer.name)) for layer in traced.layers]


def _size(tensors: Iterable[Tensor]) -> int:
    """Return how many values tensors have in all."""
    return sum(tensor.numel() for tensor in tensors)


def _tabulated(traced: Trace) -> set[str]:
    """Return the temporal layers that a quantized model does not run: their features come from a table."""
    features = {layer.name: layer.cacheable for layer in traced.temporal if layer.name in traced.features}
    every = all(features.values())
    return {layer.name for layer in traced.temporal if every or features.get(layer.name, False)}


def _sites(sampler: Sampler, names: set[str], inputs: Inputs) -> Counter[Site]:
    """Return what the layers `names` are called with in a call of the model, and how often."""
    with sites_of(sampler.denoiser.module, names) as found:
        sampler.denoiser(inputs)
    return found


def _packed_call(
    sampler: Sampler, recipe: Recipe | None, inputs: Inputs, progress: Progress
) -> Callable[[], object]:
    """Return a call of a copy of the model whose layers compute on arbitrary grids."""
    with progress("packing weights", total=1) as advance:
        quantized = trial(sampler, recipe or scheme("w8a8"), backend="torch")
        advance(1)
    return lambda: quantized(inputs)


@torch.no_grad()
def forecast(
    sampler: Sampler,
    *,
    recipe: Recipe | None = None,
    batch: int = 1,
    thorough: bool = True,
    progress: Progress = silent,
) -> Forecast:
    """Measure the layers of a full-precision denoiser in float32 and int8 at its own shapes, and predict a
    W8A8 step on this machine's CPU.

    Layers whose features would come from a table are counted in float32 alone: the quantized model does not
    run them. `recipe` is what the model would be quantized by, the scheme `w8a8` if it is None. What is not
    `thorough` stays within about a minute, whatever the model: it times the shapes with most work, and
    concludes the others, and the step of a large model, from these.

    Raises:
        ValueError: the model is quantized already, or is not on the CPU.
    """
    _check_model(sampler.denoiser.module)
    example: Inputs = sampler.example()
    traced = trace(sampler.denoiser, example)
    inputs, tabulated = example.resized(batch), _tabulated(traced)
    kept = _sites(sampler, {layer.name for layer in traced.layers} - tabulated, inputs)
    dropped = _sites(sampler, tabulated, inputs)
    weights = _size(_weights(sampler.denoiser.module, traced))
    limit = inf if thorough else QUICK_SHAPES
    with progress("timing layers", total=len(kept) + len(dropped)) as advance:
        timings = timed(kept, most=limit, advance=advance)
        # Layers that a quantized model drops are few and small as a rule.
        gone = total(dropped, timed(dropped, most=limit / 10, advance=advance)).fp32_ms
    layers = total(kept, timings)
    calls: list[Callable[[], object]] = [lambda: sampler.denoiser(inputs)]
    tried = available() and (thorough or weights <= QUICK_WEIGHTS)
    if tried:
        calls.append(_packed_call(sampler, recipe, inputs, progress))
    step, *others = _steps(*calls, most=inf if thorough else QUICK_STEPS)
    rest = max(0.0, step - gone - layers.fp32_ms)
    predicted = others[0] if others else (rest + layers.int8_ms if available() else None)
    return Forecast(
        machine=describe_machine(torch.get_num_threads()),
        batch=batch,
        shapes=tuple(sorted(timings.values(), key=lambda timing: -timing.fp32_ms * timing.count)),
        fp32_ms=step,
        rest_ms=rest,
        predicted_ms=predicted,
        speedup=None if predicted is None else step / predicted,
        weight_bytes={"fp32": 4 * weights, "w8a8": 2 * weights, "w4a8": weights + weights // 2},
        extrapolated=_extrapolated(
            layers, shapes=len(kept), timed=len(timings), tried=tried or not available()
        ),
    )


def _extrapolated(layers: Total, *, shapes: int, timed: int, tried: bool) -> tuple[str, ...]:
    """Return in words what a forecast did not measure."""
    said = []
    if timed < shapes:
        said.append(
            f"{timed} of {shapes} layer shapes were timed, with {layers.measured:.0%} "
            "of the work; the others count by their work"
        )
    if not tried:
        said.append(
            "the W8A8 step is that of the layers and of what is around "
            "them in float32; no quantized copy was run"
        )
    return tuple(said)


def expected_seconds(sampler: Sampler, *, batch: int = 1, thorough: bool = True) -> float:
    """Return about what a forecast takes: each shape twice for a moment, some steps, and a copy of the
    model.
    """
    traced = trace(sampler.denoiser, sampler.example())
    layers = _weights(sampler.denoiser.module, traced)
    weights = _size(layers)
    inputs = sampler.example().resized(batch)
    with torch.no_grad():
        step = seconds_of(lambda: sampler.denoiser(inputs))
    # A weight shape occurs at about two sizes of the input.
    shapes = 2 * len({tuple(weight.shape) for weight in layers})
    # A layer that is slower than its moment is called four times in each form.
    timing, steps = max(2 * SECONDS * shapes, 8 * step), 2 * ROUNDS * RUN * step
    packing = PACKING * weights
    if thorough:
        return timing + steps + packing
    return (
        min(timing, QUICK_SHAPES)
        + min(steps, max(QUICK_STEPS, 4 * step))
        + (packing if weights <= QUICK_WEIGHTS else 0.0)
    )
