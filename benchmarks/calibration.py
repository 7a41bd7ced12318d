"""What a calibration costs by model size: time of each stage, and peak memory with and without a limit.

    python benchmarks/calibration.py --output-dir benchmarks/results/calibration --ddpm64 .../ddpm64

A cell quantizes a model in a process of its own, with a limit of memory or without. `held` is what the
process held at most beyond what it held with the model loaded and run once, which the limit bounds; `beside
the model` is its peak without the model's weights, Python and libraries included. Time is by stage, in wall
and processor seconds on one thread. Equal digests say that a limit changes nothing but time. Finished cells
are kept; the script goes on with what is missing. Models and settings are those of `solvers.py`, with the
solver of the presets.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reference import environment
from solvers import SOLVERS, TimedJournal, known_models

from tfmq.calibration.store import CalibrationStore
from tfmq.evaluation.cost.system import peak_bytes, resident_bytes
from tfmq.jobs.job import Job
from tfmq.jobs.workflow import quantize_denoiser
from tfmq.nn.plan import packed_layers
from tfmq.reconstruction.resources import Resources
from tfmq.storage.atomic import read_json, write_json
from tfmq.storage.digest import tensor_digest

MIB = 2**20
# The names of a job's stages, and what a reader calls them.
STAGES = {"calibration": "sampling", "activations": "ranges", "temporal": "temporal block", "unit_": "units"}


@dataclass(frozen=True)
class Cell:
    """A model, and the MiB that its calibration may hold; None sets no limit."""

    model: str
    limit: int | None

    @property
    def name(self) -> str:
        return f"{self.model}-{self.limit or 'free'}"


CELLS = tuple(
    Cell(model, limit)
    for model, limits in (("default", (None, 512)), ("ddpm64", (None, 4096, 2048)))
    for limit in limits
)


def measure(cell: Cell, ddpm64: Path | None) -> dict[str, Any]:
    """Quantize in this process, and return what it took."""
    model = known_models(1, ddpm64)[cell.model]
    sampler = model.make()
    module = sampler.denoiser.module
    parameters = sum(parameter.numel() for parameter in module.parameters())
    sampler.denoiser(sampler.example().resized(model.recipe.calibration.batch_size))
    before, began, processor = resident_bytes(), time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job"
        journal, store = TimedJournal(job, {}, resume=False), CalibrationStore(job / "calibration")
        limits = Resources(max_memory=None if cell.limit is None else cell.limit * MIB)
        quantize_denoiser(
            Job(
                sampler=sampler,
                recipe=SOLVERS["gptq"](model.recipe),
                store=store,
                journal=journal,
                resources=limits,
            )
        )
        spent = {
            name: [read_json(path) for path in job.glob(f"{prefix}*.time.json")]
            for prefix, name in STAGES.items()
        }
    return {
        **{"model": cell.model, "parameters": parameters, "limit_mib": cell.limit},
        # Linux updates its counts of pages in batches, so that the peak may read a few pages below the
        # present.
        **{"before_mib": before / MIB, "held_mib": max(peak_bytes() - before, 0) / MIB},
        **{"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - processor},
        "stages": {name: sum(part["cpu_seconds"] for part in parts) for name, parts in spent.items()},
        "digest": tensor_digest(
            {
                f"{name}.{key}": value
                for name, layer in packed_layers(module).items()
                for key, value in layer.state_dict().items()
            }
        ),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the cells as a Markdown table."""
    names = " | ".join(f"{name}, CPU s" for name in STAGES.values())
    lines = [
        (
            "| model | parameters | limit | held | peak | beside the "
            f"model | {names} | all, CPU s | same bytes |"
        ),
        f"|---|---|---|---|---|---|{'---|' * len(STAGES)}---|---|",
    ]
    free = {row["model"]: row["digest"] for row in rows if row["limit_mib"] is None}
    for row in rows:
        stages = " | ".join(f"{row['stages'][name]:.0f}" for name in STAGES.values())
        limit = "" if row["limit_mib"] is None else f"{row['limit_mib']} MiB"
        peak = row["before_mib"] + row["held_mib"]
        same = (
            {True: "yes", False: "NO"}[free[row["model"]] == row["digest"]]
            if row["limit_mib"] and row["model"] in free
            else ""
        )
        lines.append(
            f"| {row['model']} | {row['parameters'] / 1e6:.1f} M | {limit} | {row['held_mib']:.0f} MiB "
            f"| {peak:.0f} MiB | {peak - 4 * row['parameters'] / MIB:.0f} MiB "
            f"| {stages} | {row['cpu_seconds']:.0f} | {same} |"
        )
    return "\n".join(lines) + "\n"


def write_results(directory: Path) -> None:
    paths = [directory / f"{cell.name}.json" for cell in CELLS]
    rows = [read_json(path) for path in paths if path.exists()]
    if rows:
        write_json(
            directory / "calibration.json",
            {"environment": environment("python benchmarks/calibration.py"), "cells": rows},
        )
        (directory / "calibration.md").write_text(table(rows))
        print(table(rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--ddpm64",
        type=Path,
        help="folder of the 64x64 DDPM, whose load.py has build_unet, load_unet and scheduler",
    )
    parser.add_argument("--only", default="", help="measure only cells whose name contains this")
    parser.add_argument(
        "--cell", type=int, help="measure this cell here and print it; what the script calls itself with"
    )
    options = parser.parse_args()
    if options.cell is not None:
        print(json.dumps(measure(CELLS[options.cell], options.ddpm64)))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(CELLS):
        path = options.output_dir / f"{cell.name}.json"
        if (
            path.exists()
            or options.only not in cell.name
            or (cell.model == "ddpm64" and options.ddpm64 is None)
        ):
            continue
        given = [] if options.ddpm64 is None else ["--ddpm64", str(options.ddpm64)]
        command = [
            sys.executable,
            __file__,
            "--output-dir",
            str(options.output_dir),
            "--cell",
            str(number),
            *given,
        ]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        write_json(path, json.loads(done.stdout.splitlines()[-1]))
        write_results(options.output_dir)
    write_results(options.output_dir)


if __name__ == "__main__":
    main()
