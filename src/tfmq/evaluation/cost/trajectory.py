"""Calls of a pipeline's denoiser along its own trajectory, and the time that the pipeline itself takes around
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from tfmq.calibration.trajectory import recorded_calls
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.watch import ModuleCall, watched
from tfmq.progress import Progress, silent
from tfmq.stopwatch import timed


def spread_calls(
    sampler: Sampler, *, steps: int, count: int, seed: int = 0, progress: Progress = silent
) -> list[Inputs]:
    """Return at most `count` of the calls that drawing one image in `steps` steps makes, spread evenly over
    the trajectory.

    Raises:
        CalibrationError: the model breaks on its own trajectory.
    """
    calls: list[Inputs] = []
    with progress("trajectory", steps) as advance:

        def keep(call: Inputs) -> None:
            calls.append(call)
            advance()

        with recorded_calls(sampler.denoiser, keep):
            sampler.run(range(1), steps=steps, seed=seed)
    wanted = min(count, len(calls))
    return [calls[(2 * number + 1) * len(calls) // (2 * wanted)] for number in range(wanted)]


@contextmanager
def _answered_at_once(module: nn.Module, spent: list[float]) -> Iterator[None]:
    """Let `module` compute its first call for a while and answer every other with that output; `spent` gets
    the time of the first.
    """
    own, forward = module.__dict__.get("forward"), module.forward
    kept: list[Any] = []

    def answer(*args: Any, **kwargs: Any) -> Any:
        if not kept:
            output, seconds = timed(lambda: forward(*args, **kwargs))
            kept.append(output)
            spent.append(seconds)
        return kept[0]

    module.forward = answer
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@dataclass(frozen=True)
class Rehearsal:
    """Drawing with a denoiser that computes once: its first call, the number of calls, the seconds beside
    them, and the bytes of an image.
    """

    call: Inputs
    calls: int
    around: float
    image_bytes: int


def rehearsed(sampler: Sampler, *, images: int, steps: int) -> Rehearsal:
    """Go through drawing `images` images in `steps` steps without computing more than one call of the
    denoiser.
    """
    module, spent, calls = sampler.denoiser.module, list[float](), list[Inputs]()
    counted = 0

    def note(call: ModuleCall) -> None:
        nonlocal counted
        counted += 1
        if not calls:
            calls.append(sampler.denoiser.bind(call.args, call.kwargs))

    with watched(module, before=note), _answered_at_once(module, spent):
        drawn, took = timed(lambda: sampler.run(range(images), steps=steps, seed=0))
    return Rehearsal(calls[0], counted, max(0.0, took - sum(spent)), drawn[0].numel())


def seconds_around(sampler: Sampler, *, images: int, steps: int) -> float:
    """Return the time that drawing `images` images takes beside the denoiser: scheduler, text encoder,
    decoder.
    """
    return rehearsed(sampler, images=images, steps=steps).around
