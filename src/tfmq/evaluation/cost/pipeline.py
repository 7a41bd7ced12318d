"""Benchmark a quantized pipeline: what the variants run is written down first, then measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tfmq.artifact import stored_manifest
from tfmq.evaluation.cost.bench import Note, Plan, measure
from tfmq.evaluation.cost.process import TURN
from tfmq.evaluation.cost.row import CostRow
from tfmq.evaluation.cost.source import Source, dequantized
from tfmq.evaluation.cost.trajectory import seconds_around, spread_calls
from tfmq.evaluation.cost.variant import BASE, VARIANTS, absent
from tfmq.models.module_file import ModuleFile
from tfmq.models.sampler import Sampler
from tfmq.nn.swap import is_quantized
from tfmq.progress import Progress, silent
from tfmq.stopwatch import seconds_of

# Number of calls that accuracy is measured on. Libraries with a calibration of their own calibrate on them
# too.
CALLS = 8


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for; see `Plan` for the fields of the same names.

    Args:
        directory: where the quantized denoiser is.
        sampler: draws the trajectory: a sampler of the original, or of the quantized model where there is no
            original.
        module: gives the original, where diffusers cannot build it from a configuration.
    """

    directory: Path
    sampler: Sampler
    model: str
    variants: Sequence[str]
    batches: Sequence[int]
    rounds: int
    threads: int
    device: str = "cpu"
    steps: int
    module: ModuleFile | None = None

    @property
    def exact(self) -> bool:
        """Whether the true original is there."""
        return not is_quantized(self.sampler.denoiser.module)


def expected_seconds(request: Request, *, opened: float) -> float:
    """Return about what a benchmark takes beside compiling: starts of processes, each as long as opening the
    model took here, and turns.
    """
    names = [BASE, *(name for name in request.variants if name != BASE and not absent(name))]
    starts = sum(1 + VARIANTS[name].builds + VARIANTS[name].caches for name in names)
    with torch.no_grad():
        example = request.sampler.example().resized(max(request.batches))
        a_call = seconds_of(lambda: request.sampler.denoiser(example))
    calls = (CALLS + 2) * starts * a_call
    return request.steps * a_call + len(request.batches) * (
        starts * opened + calls + request.rounds * len(names) * max(TURN, a_call)
    )


def bench(request: Request, *, folder: Path, note: Note, progress: Progress = silent) -> Iterator[CostRow]:
    """Yield a row for every batch size and variant; see `measure`.

    Without the original, full precision is measured on the architecture with dequantized weights, which takes
    the same time.

    Args:
        request: what to measure.
        folder: takes files; it is empty at first.
        note: is told about each variant that is left out.
        progress: shows bars.

    Raises:
        ValueError: there is no original, and the model is none that diffusers can build.
        CheckpointError: `directory` holds no quantized model.
    """
    module = request.sampler.denoiser.module
    original = module if request.exact else dequantized(module)
    scheme = stored_manifest(request.directory).provenance.scheme
    calls = spread_calls(request.sampler, steps=request.steps, count=CALLS, progress=progress)
    names = {"sample": request.sampler.denoiser.sample, "timestep": request.sampler.denoiser.timestep}
    source = Source(quantized=request.directory, folder=folder / "source", module=request.module, **names)
    source.write(original, calls)
    plan = Plan(
        source=source,
        model=request.model,
        scheme=scheme,
        variants=request.variants,
        batches=request.batches,
        rounds=request.rounds,
        threads=request.threads,
        device=request.device,
        steps=request.steps,
        rows_per_image=len(calls[0]),
        exact=request.exact,
    )

    def around(images: int) -> float:
        return seconds_around(request.sampler, images=images, steps=request.steps)

    yield from measure(plan, around=around, folder=folder, note=note, progress=progress)
