"""What to expect of integers on this machine, measured in seconds, before hours of calibration.

Each layer's shape is timed in float32 and in int8, which shows where time goes, and a step of the model in
float32 and of a copy whose layers compute on arbitrary grids: a step takes what layers take, and attention,
and calling them all.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, prod
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.evaluation.cost.system import describe_machine
from tfmq.evaluation.trial import trial
from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.kernels.onednn import OnednnKernel, available, supports
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.models.trace import trace
from tfmq.nn.operation import operand, operation_of, weight_of
from tfmq.nn.swap import is_quantized
from tfmq.numerics.operations import Linear, Operation
from tfmq.progress import Advance, Progress, seconds_of, silent
from tfmq.recipes.presets import scheme
from tfmq.recipes.recipe import Recipe

# Seconds for which each shape is timed, float32 and int8 in turns. The medians count.
SECONDS = 0.08
# A quick forecast spends so many seconds on shapes and on steps, and packs no copy of a model with more
# weights than this.
QUICK_SHAPES, QUICK_STEPS, QUICK_WEIGHTS = 20.0, 15.0, 50_000_000
# Number of turns of each model, and steps in a turn. The first step of a turn does not count, since the other
# model's weights are in the caches.
ROUNDS, RUN = 3, 4
LEVELS = 256
# Seconds that packing one weight takes, for the estimate that is printed before the work.
PACKING = 2e-7


@dataclass(frozen=True)
class Site:
    """What makes two layers equally fast: the operation, the shapes of weight and input, a bias or none."""

    operation: Operation
    weight: tuple[int, ...]
    input: tuple[int, ...]
    bias: bool


@dataclass(frozen=True, kw_only=True)
class ShapeTiming:
    """The time of one call of a layer of this kind, in ms; `count` layers of the model are like it. Without
    an integer form `int8_ms` is None.
    """

    operation: str
    weight: tuple[int, ...]
    input: tuple[int, ...]
    count: int
    fp32_ms: float
    int8_ms: float | None


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


@contextmanager
def _sites(module: nn.Module, names: set[str]) -> Iterator[Counter[Site]]:
    """Count what the layers `names` are called with while the context is open."""
    found: Counter[Site] = Counter()

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        operation = operation_of(layer)
        if operation is not None:
            found[
                Site(
                    operation,
                    tuple(weight_of(layer).shape),
                    tuple(operand(args, kwargs).shape),
                    layer.bias is not None,
                )
            ] += 1

    handles = [module.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True) for name in names]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _milliseconds(*calls: Callable[[], object]) -> list[float]:
    """Return the median time of each call; they take turns."""
    for call in calls:
        call()
    slices: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(slices[0]) < 3:
        for call, seconds in zip(calls, slices, strict=True):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
    return [median(seconds) * 1e3 for seconds in slices]


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
            for step in range(RUN if time.perf_counter() < end else 2):
                began = time.perf_counter()
                call()
                if step:
                    found.append(time.perf_counter() - began)
    return [median(found) * 1e3 for found in seconds]


def _work(site: Site) -> int:
    """Return the multiplications of a call: every weight at every place of the output, or of the input that
    is spread out.
    """
    if isinstance(site.operation, Linear):
        return prod(site.weight) * prod(site.input[:-1])
    sizes = site.input[2:]
    window = site.operation.window(site.weight[2:])
    return prod(site.weight) * site.input[0] * prod(sizes if window.spaced else window.places(sizes))


def _timed(sites: Mapping[Site, int], *, most: float, advance: Advance) -> dict[Site, ShapeTiming]:
    """Return the times of the shapes with most work first, as many as begin within `most` seconds."""
    found: dict[Site, ShapeTiming] = {}
    end = time.perf_counter() + most
    for site in sorted(sites, key=lambda site: _work(site) * sites[site], reverse=True):
        if found and time.perf_counter() > end:
            break
        found[site] = _time(site, sites[site])
        advance(1)
    return found


@dataclass(frozen=True)
class _Total:
    """Milliseconds of all layers in float32 and in int8 (float32 where there is no integer form), and the
    share of work that was measured.
    """

    fp32_ms: float
    int8_ms: float
    measured: float


def _total(sites: Mapping[Site, int], found: Mapping[Site, ShapeTiming]) -> _Total:
    """Return the time of all layers: those of shapes that were not timed take as long for their work as the
    timed ones do.
    """
    work = {site: _work(site) * count for site, count in sites.items()}
    measured = sum(work[site] for site in found) / max(1, sum(work.values()))
    share = max(measured, 1e-9)
    fp32 = sum(timing.fp32_ms * timing.count for timing in found.values()) / share
    int8 = (
        sum(
            (timing.fp32_ms if timing.int8_ms is None else timing.int8_ms) * timing.count
            for timing in found.values()
        )
        / share
    )
    return _Total(fp32, int8, measured) if found else _Total(0.0, 0.0, 1.0)


def _kernel(site: Site) -> OnednnKernel | None:
    if not available():
        return None
    values = torch.randint(-127, 128, site.weight, dtype=torch.int16)
    weight = IntegerWeight(
        site.operation,
        values,
        torch.full((site.weight[0], 1), 1e-3),
        torch.zeros(site.weight[0]) if site.bias else None,
    )
    return OnednnKernel(weight) if supports(weight, LEVELS) else None


def _time(site: Site, count: int) -> ShapeTiming:
    weight, bias = torch.randn(site.weight), torch.zeros(site.weight[0]) if site.bias else None
    x = torch.randn(site.input)
    kernel = _kernel(site)
    calls: list[Callable[[], Tensor]] = [lambda: site.operation(x, weight, bias)]
    if kernel is not None:
        # Inputs of a layer in a quantized denoiser are channels-last, since other such layers made them.
        arranged = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        rows = Rows(torch.full((1, 1), 0.02), torch.full((1, 1), 128, dtype=torch.uint8), LEVELS)
        calls.append(lambda: kernel(arranged, rows))
    times = _milliseconds(*calls)
    name = type(site.operation).__name__.lower()
    int8 = times[1] if kernel is not None else None
    return ShapeTiming(
        operation=name, weight=site.weight, input=site.input, count=count, fp32_ms=times[0], int8_ms=int8
    )


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
    module = sampler.denoiser.module
    if is_quantized(module):
        raise ValueError(
            "the model is quantized already; measure it with tfmq bench, or pass the full-precision one"
        )
    if next(module.parameters()).device.type != "cpu":
        raise ValueError("the forecast is for the CPU, whose integer operators it measures")
    example: Inputs = sampler.example()
    traced = trace(sampler.denoiser, example)
    inputs = example.resized(batch)
    features = {layer.name: layer.cacheable for layer in traced.temporal if layer.name in traced.features}
    tabulated = {
        layer.name for layer in traced.temporal if all(features.values()) or features.get(layer.name, False)
    }
    with _sites(module, {layer.name for layer in traced.layers} - tabulated) as kept:
        sampler.denoiser(inputs)
    with _sites(module, tabulated) as dropped:
        sampler.denoiser(inputs)
    weights = sum(prod(weight_of(module.get_submodule(layer.name)).shape) for layer in traced.layers)
    limit = inf if thorough else QUICK_SHAPES
    with progress("timing layers", total=len(kept) + len(dropped)) as advance:
        timings = _timed(kept, most=limit, advance=advance)
        # Layers that a quantized model drops are few and small as a rule.
        gone = _total(dropped, _timed(dropped, most=limit / 10, advance=advance)).fp32_ms
    layers = _total(kept, timings)
    calls: list[Callable[[], object]] = [lambda: sampler.denoiser(inputs)]
    tried = available() and (thorough or weights <= QUICK_WEIGHTS)
    if tried:
        with progress("packing weights", total=1) as advance:
            quantized = trial(sampler, recipe or scheme("w8a8"), backend="torch")
            advance(1)
        calls.append(lambda: quantized(inputs))
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


def _extrapolated(layers: _Total, *, shapes: int, timed: int, tried: bool) -> tuple[str, ...]:
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
    modules = [sampler.denoiser.module.get_submodule(layer.name) for layer in traced.layers]
    weights = sum(weight_of(module).numel() for module in modules)
    inputs = sampler.example().resized(batch)
    with torch.no_grad():
        step = seconds_of(lambda: sampler.denoiser(inputs))
    # A weight shape occurs at about two sizes of the input.
    shapes = 2 * len({tuple(weight_of(module).shape) for module in modules})
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
