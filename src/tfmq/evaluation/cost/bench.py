"""Measure the cost of variants side by side."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import tfmq.evaluation.cost.variants  # noqa: F401 - fills the registry
from tfmq.evaluation.cost.process import Worker, WorkerError
from tfmq.evaluation.cost.row import CostRow
from tfmq.evaluation.cost.source import Source
from tfmq.evaluation.cost.timing import Timing, interleaved
from tfmq.evaluation.cost.variant import BASE, KINDS, VARIANTS, Setting, absent
from tfmq.numerics.errors import sqnr_db
from tfmq.progress import Progress, silent
from tfmq.storage.atomic import read_tensors

Note = Callable[[str], None]
Around = Callable[[int], float]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured.

    Args:
        source: the models and calls.
        model: what the rows call it.
        scheme: the recipe of the quantized model.
        variants: names; the base of the ratios is always there.
        batches: rows of one denoiser call.
        rounds: rounds without foreign work that are wanted.
        threads: number of threads of every variant.
        device: device of every variant that runs in torch.
        steps: denoising steps of a sampling run.
        rows_per_image: rows that one image adds to a call, 2 under guidance.
        exact: whether `source` holds the true original. Otherwise accuracy against it means nothing and is
            not stated.
    """

    source: Source
    model: str
    scheme: str | None
    variants: Sequence[str]
    batches: Sequence[int]
    rounds: int
    threads: int
    device: str = "cpu"
    steps: int
    rows_per_image: int = 1
    exact: bool = True

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in VARIANTS]
        if unknown:
            raise ValueError(f"there is no variant {unknown[0]!r}; choose from {', '.join(VARIANTS)}")
        if min(*self.batches, self.rounds, self.threads, self.steps) < 1:
            raise ValueError("batches, rounds, threads and steps must be at least 1")

    def names(self) -> list[str]:
        """Return the variants, the base first, each once."""
        return list(dict.fromkeys([BASE, *self.variants]))


def measure(
    plan: Plan, *, around: Around, folder: Path, note: Note, progress: Progress = silent
) -> Iterator[CostRow]:
    """Yield a row for every batch size and variant.

    Each variant loads in a process of its own, alone; then all of one batch size take turns. A variant whose
    library is absent, or that fails, is left out.

    Args:
        plan: what to measure.
        around: gives the seconds that drawing a number of images takes beside the denoiser.
        folder: takes the files of the variants, and keeps them.
        note: is told in one line about each variant that is left out.
        progress: shows bars.

    Raises:
        WorkerError: the base fails, or a variant in the middle of its turns.
    """
    missing = {name: line for name in plan.names() if (line := absent(name))}
    for line in missing.values():
        note(line)
    for batch in plan.batches:
        settings = {
            name: Setting(
                source=plan.source,
                folder=folder / f"{name}-{batch}",
                batch=batch,
                threads=plan.threads,
                device=plan.device,
            )
            for name in plan.names()
            if name not in missing
        }
        yield from _measured(plan, settings, batch, around=around, note=note, progress=progress)


def _measured(
    plan: Plan, settings: Mapping[str, Setting], batch: int, *, around: Around, note: Note, progress: Progress
) -> Iterator[CostRow]:
    with ExitStack() as stack:
        started: dict[str, tuple[Worker, dict[str, Any]] | None] = {}
        with progress(f"loading, batch {batch}", len(settings)) as advance:
            for name, setting in settings.items():
                started[name] = _tried(name, setting, stack, batch, note)
                advance()
        workers = {name: pair[0] for name, pair in started.items() if pair}
        spent = {name: pair[1] for name, pair in started.items() if pair}
        outputs = {
            name: _outputs(worker, settings[name].folder / "outputs.safetensors")
            for name, worker in workers.items()
        }
        with progress(f"rounds, batch {batch}", plan.rounds) as advance:
            timings = interleaved(
                {name: worker.turn for name, worker in workers.items()}, rounds=plan.rounds, advance=advance
            )
    beside = around(max(1, batch // plan.rows_per_image))
    for name in timings:
        accuracy = _accuracy(outputs[BASE], outputs[name]) if plan.exact and name != BASE else None
        yield _row(plan, name, batch, timings, beside=beside, sqnr=accuracy, spent=spent[name])


def _tried(
    name: str, setting: Setting, stack: ExitStack, batch: int, note: Note
) -> tuple[Worker, dict[str, Any]] | None:
    """Return what `_started` does; None, with a note, for a variant that cannot, unless it is the base."""
    try:
        return _started(name, setting, stack)
    except WorkerError as error:
        if name == BASE:
            raise
        note(f"{name} failed at batch {batch}: {error}")
        return None


def _started(name: str, setting: Setting, stack: ExitStack) -> tuple[Worker, dict[str, Any]]:
    """Return the worker of a variant, which `stack` ends, and what its first start and a later one took."""
    if VARIANTS[name].builds:
        with Worker(name, setting, build=True) as builder:
            builder.answer()
    first = None
    if VARIANTS[name].caches:
        with Worker(name, setting) as starter:
            first = starter.answer()
    with ExitStack() as own:
        worker = own.enter_context(Worker(name, setting))
        later = worker.answer()
        stack.push(own.pop_all())
    first = first or later
    spent = {
        **later,
        "load_s": first["load_s"],
        "compile_s": first["compile_s"],
        "first_peak_rss_bytes": first["peak_rss_bytes"],
    }
    return worker, {**spent, "restart_s": later["load_s"] + later["compile_s"]}


def _outputs(worker: Worker, path: Path) -> list[Tensor]:
    worker.ask(do="outputs", path=str(path))
    tensors, _ = read_tensors(path)
    return [tensors[str(number)] for number in range(len(tensors))]


def _accuracy(reference: Sequence[Tensor], outputs: Sequence[Tensor]) -> float | None:
    """Return the mean SQNR in dB over calls; None where the outputs are the same to the bit."""
    values = [sqnr_db(full, output) for full, output in zip(reference, outputs, strict=True)]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _row(
    plan: Plan,
    name: str,
    batch: int,
    timings: Mapping[str, Timing],
    *,
    beside: float,
    sqnr: float | None,
    spent: Mapping[str, Any],
) -> CostRow:
    timing, base = timings[name], timings[BASE]
    images = max(1, batch // plan.rows_per_image)
    calls_an_image = images * plan.rows_per_image / batch
    return CostRow(
        backend=name,
        model=plan.model,
        scheme=plan.scheme if KINDS[name] == "backend" else None,
        batch=batch,
        ms_per_step=1e3 * timing.seconds,
        speedup=base.seconds / timing.seconds,
        images_per_second=images / (plan.steps * timing.seconds * calls_an_image + beside),
        sqnr_db=sqnr,
        rounds=timing.rounds,
        rounds_dropped=timing.dropped,
        clean=timing.clean,
        **spent,
    )
