"""The shapes that layers of a model have, and how long each takes in float32 and in integers."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from tfmq.kernels.kernel import IntegerWeight, Rows
from tfmq.kernels.onednn import OnednnKernel, available, supports
from tfmq.nn.operation import operand, operation_of, weight_of
from tfmq.nn.submodules import named
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.operations import Operation
from tfmq.progress import Advance
from tfmq.stopwatch import call_seconds

# Seconds for which each shape is timed, float32 and int8 in turns. The medians count.
SECONDS = 0.08
# Number of codes of an 8-bit input.
LEVELS = 256


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


@contextmanager
def sites_of(module: nn.Module, names: set[str]) -> Iterator[Counter[Site]]:
    """Count what the layers `names` are called with while the context is open."""
    found: Counter[Site] = Counter()

    def note(call: ModuleCall) -> None:
        layer, operation = call.module, operation_of(call.module)
        if operation is not None:
            found[
                Site(
                    operation,
                    tuple(weight_of(layer).shape),
                    tuple(operand(call.args, call.kwargs).shape),
                    layer.bias is not None,
                )
            ] += 1

    with all_watched(named(module, names), before=note):
        yield found


def _milliseconds(*calls: Callable[[], object]) -> list[float]:
    """Return the median time of each call; they take turns."""
    for call in calls:
        call()
    slices: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end or len(slices[0]) < 3:
        for call, seconds in zip(calls, slices, strict=True):
            seconds.append(call_seconds(call))
    return [median(seconds) * 1e3 for seconds in slices]


def work_of(site: Site) -> int:
    """Return the multiplications of a call."""
    return site.operation.work(site.weight, site.input)


def timed(sites: Mapping[Site, int], *, most: float, advance: Advance) -> dict[Site, ShapeTiming]:
    """Return the times of the shapes with most work first, as many as begin within `most` seconds."""
    found: dict[Site, ShapeTiming] = {}
    end = time.perf_counter() + most
    for site in sorted(sites, key=lambda site: work_of(site) * sites[site], reverse=True):
        if found and time.perf_counter() > end:
            break
        found[site] = _time(site, sites[site])
        advance(1)
    return found


@dataclass(frozen=True)
class Total:
    """Milliseconds of all layers in float32 and in int8 (float32 where there is no integer form), and the
    share of work that was measured.
    """

    fp32_ms: float
    int8_ms: float
    measured: float


def total(sites: Mapping[Site, int], found: Mapping[Site, ShapeTiming]) -> Total:
    """Return the time of all layers: those of shapes that were not timed take as long for their work as the
    timed ones do.
    """
    work = {site: work_of(site) * count for site, count in sites.items()}
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
    return Total(fp32, int8, measured) if found else Total(0.0, 0.0, 1.0)


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
