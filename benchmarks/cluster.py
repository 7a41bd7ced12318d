"""What many workers bring: the speed-up of sampling, and the costs that a plan for more machines follows
from.

    python benchmarks/cluster.py sampling --workers 1,2          # images a second, by number of workers; runs
    alone on a quiet machine python benchmarks/cluster.py units --workers 1,2,10,100      # time and bytes of
    each stage and unit, and what follows for many workers

`sampling` draws the same images of the embedded model with each number of workers, one thread each, and
checks that they are the same bytes. Workers are warm: each has drawn a batch before the clock starts, since
importing and opening take seconds once.

`units` quantizes the embedded model with `rounding.inputs: full` in this process, with one thread, and
measures by stage: the processor seconds, which a busy machine changes little, and the bytes that a worker
reads and writes. From these it computes the time with W workers: the stages that one process does, the
trajectory in batches, and units given to whoever is free, in order; each worker opens the model and reads the
finished stages once. That is a schedule of measured costs, and no measurement of W workers.

Prints one JSON object; with `--output-dir` it is also kept there, as `sampling.json` or `units.json`.
"""

import argparse
import heapq
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from reference import environment

import tfmq
from tfmq.api import store_of
from tfmq.cluster.crew import Cluster, connected
from tfmq.cluster.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.jobs.job import Job
from tfmq.jobs.units import unit_alone, unit_file
from tfmq.jobs.workflow import BEFORE_UNITS, run
from tfmq.models.sampler import Sampler
from tfmq.nn.swap import precision
from tfmq.nn.temporal import without_tables
from tfmq.progress import Advance, silent
from tfmq.reconstruction.resources import UNLIMITED
from tfmq.storage.atomic import write_json
from tfmq.storage.journal import Journal
from tfmq.targets import fingerprint_of, open_sampler, open_target

STEPS = 50


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Measure images a second by number of workers."""
    rows, seen = [], set()
    opening = partial(open_sampler, options.model)
    for workers in options.workers:
        with connected(Cluster(workers=workers)) as crew:
            for _ in range(2):
                draw(
                    crew,
                    opening,
                    workers * options.batch_size,
                    steps=STEPS,
                    seed=1,
                    batch_size=options.batch_size,
                )
            seconds = []
            for _ in range(options.repeats):
                began = time.perf_counter()
                images = draw(
                    crew,
                    opening,
                    options.num_images,
                    steps=options.steps,
                    seed=0,
                    batch_size=options.batch_size,
                )
                seconds.append(time.perf_counter() - began)
        seen.add(images.tobytes())
        rows.append(
            {
                "workers": workers,
                "seconds": sorted(seconds),
                "images_per_second": options.num_images / min(seconds),
            }
        )
    for row in rows:
        row["speedup"] = rows[0]["seconds"][0] / row["seconds"][0]
    return {
        "rows": rows,
        "same_bytes": len(seen) == 1,
        "images": options.num_images,
        "steps": options.steps,
        "batch_size": options.batch_size,
    }


def size(folder: Path, pattern: str = "*") -> int:
    """Return the bytes of the files in a folder that match a pattern."""
    return sum(path.stat().st_size for path in folder.rglob(pattern) if path.is_file())


class Stopwatch:
    """Notes the processor seconds of every stage that reports its progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, description: str, total: int) -> Iterator[Advance]:
        began = time.process_time()
        with silent(description, total) as advance:
            yield advance
        self.seconds[description] = time.process_time() - began


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Return what a call returns, and the processor seconds that it took."""
    began = time.process_time()
    result = call()
    return result, time.process_time() - began


def scheduled(costs: Sequence[float], workers: int, *, ready: float) -> float:
    """Return when the last of `costs` ends, given in order to whoever is free first, with workers that are
    ready after `ready` seconds.
    """
    free = [ready] * workers
    for cost in costs:
        heapq.heapreplace(free, free[0] + cost)
    return max(free)


def units(options: argparse.Namespace) -> dict[str, Any]:
    """Measure every stage of a quantization whose units are independent, and compute what many workers would
    take.
    """
    recipe = tfmq.scheme(options.scheme)
    recipe = replace(recipe, rounding=replace(recipe.rounding, inputs="full"))
    watch = Stopwatch()
    with TemporaryDirectory() as name:
        folder = Path(name)

        def begin() -> tuple[Sampler, dict[str, Any]]:
            sampler, networks = open_target(options.model, recipe)
            return sampler, fingerprint_of(sampler, recipe, 0, UNLIMITED, networks)

        (sampler, fingerprint), opening = timed(begin)
        weights = sum(
            parameter.numel() * parameter.element_size() for parameter in sampler.denoiser.module.parameters()
        )
        store, journal = store_of(folder), Journal(folder, fingerprint, resume=False)
        job = Job(sampler=sampler, recipe=recipe, store=store, journal=journal, progress=watch)
        work, before = timed(lambda: run(job, BEFORE_UNITS))
        stages = size(folder, "*.safetensors") - size(store.directory)
        calls = sum(call.sample.numel() * call.sample.element_size() for call in job.batches)
        again, _ = open_target(options.model, recipe)
        other = Job(
            sampler=again, recipe=recipe, store=store, journal=Journal(folder, fingerprint, resume=True)
        )
        _, reading = timed(lambda: run(other, BEFORE_UNITS))
        rows = []
        for number, unit in enumerate(work.units):
            _, seconds = timed(partial(unit_alone(number, advance=lambda amount=1: None), job, work))
            written = (folder / f"{unit_file(number)}.safetensors").stat().st_size
            rows.append({"unit": unit.name, "cpu_seconds": seconds, "bytes_written": written})
        with (
            torch.no_grad(),
            precision(sampler.denoiser.module, weights="full", inputs="full"),
            without_tables(sampler.denoiser.module),
        ):
            _, network = timed(lambda: [sampler.denoiser(call) for call in job.batches])
        trajectory = watch.seconds["calibration: sampling"]
        count = -(-recipe.calibration.samples // recipe.calibration.batch_size)
        costs, serial = [row["cpu_seconds"] for row in rows], before - trajectory
        plan = [
            {
                "workers": workers,
                "seconds": opening
                + serial
                + scheduled([trajectory / count] * count, workers, ready=opening)
                + scheduled(costs, workers, ready=opening + reading),
            }
            for workers in options.workers
        ]
        alone = opening + before + sum(costs)
        return {
            "bytes": {
                "model": weights,
                "trajectory": size(store.directory),
                "finished_stages": stages,
                "calls_of_a_unit": calls,
            },
            "cpu_seconds": {
                "opening": opening,
                "trajectory": trajectory,
                "before_the_units_in_one_process": serial,
                "reading_finished_stages": reading,
                "network_on_the_calls_of_a_unit": network,
                "units": sum(costs),
                "longest_unit": max(costs),
                "alone": alone,
                **{f"stage {key}": value for key, value in watch.seconds.items()},
            },
            "units": rows,
            "plan": [{**row, "speedup": alone / row["seconds"]} for row in plan],
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sampling", "units"))
    parser.add_argument("--output-dir", type=Path, help="where the JSON object is kept")
    parser.add_argument("--model", default="default", help="pipeline directory or hub id")
    parser.add_argument("--workers", type=numbers, default=[1, 2])
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scheme", default="w4a8")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with quiet():
        found = {"sampling": sampling, "units": units}[options.what](options)
    found = {
        **environment(
            f"python benchmarks/cluster.py {options.what} --workers {','.join(map(str, options.workers))}"
        ),
        **found,
    }
    print(json.dumps(found, indent=1))
    if options.output_dir is not None:
        options.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(options.output_dir / f"{options.what}.json", found)


if __name__ == "__main__":
    main()
