"""What rounding costs and brings: every solver and budget on trained models, quality against time.

    python benchmarks/solvers.py --output-dir benchmarks/results/solvers --ddpm64 .../ddpm64

A cell is a model, a solver with its budget, and a seed. It quantizes the model to W4A8 and measures, against
full precision: the error of the units' outputs (how many dB below that of nearest codes), the SQNR of the
predicted noise along the full-precision trajectory, and the PSNR of final images from the same noise. Cells
of one model and seed share their calibration, activation ranges and temporal block, which the cell of
`nearest` computes; all else is equal too, so that they differ by the solver alone, or by the calls that it
learns from (`interval`). Cells of `samples` have a calibration of their own, of so many images instead of 32.

Time is what the stages of the job took, as the journal keeps it: processor seconds of a CPU run on one
thread, and wall seconds. A cell can be killed at any time and goes on at the unit that it had reached (which
then captures its inputs anew, at its own expense); finished cells are kept. Run it in pieces; cells are
ordered so that the bar is decided first. On one core of an Intel Xeon a cell of `default` takes about two CPU
minutes, measuring included, and 0.65 s more for each AdaRound iteration: 5 min at 400, 55 min at 5000, 3.6 h
at 20 000.

AdaRound is the paper's: released hyper-parameters, its batch of 32, and a rate of 1e-3, raised to 4 /
iterations where a budget is too short for roundings to cross over at that rate. What no cell measures, the 20
000 iterations of the paper above all, is extrapolated from the cells that do, and called that.

Models: `default`, the embedded one (3.8 M parameters, attention at one resolution); with `--ddpm64` a trained
network of 63 M parameters with attention at two resolutions, in a smaller setting (see `known_models`; a
batch of 8). There the stages before the units take 3 CPU minutes, and an AdaRound iteration should take 7 to
8 s, going by the 1.25 s of a forward call: a quarter of an hour for a hundred, an hour for 400.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from reference import Reference, environment
from solver_table import FAST, PAPER, aggregate, conclusions, draw_curves, table
from torch import Tensor

import tfmq
from tfmq.calibration.store import CalibrationStore
from tfmq.cli.progress import shown_progress
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.jobs.job import Job
from tfmq.jobs.workflow import Outcome, quantize_denoiser
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.recipes.yaml import to_dict
from tfmq.reconstruction.learning import Learning
from tfmq.storage.atomic import read_json, write_json
from tfmq.storage.journal import Journal
from tfmq.targets import open_sampler

BUDGETS = (100, 400, 1000, 2500, 5000)
POLISHES = (100, 400)
# Units learn from each fifth step, as in the published experiments, where a solver does not say otherwise.
INTERVAL = 5
Change = Callable[[Recipe], Recipe]


def _rounding(**fields: Any) -> Change:
    return lambda recipe: replace(recipe, rounding=replace(recipe.rounding, **fields))


def _calibration(change: Change, **fields: Any) -> Change:
    """Return the change with another calibration.

    Units that learn from every `interval`-th step leave the stages before them as they are, since those see
    all steps anyway.
    """

    def changed(recipe: Recipe) -> Recipe:
        recipe = change(recipe)
        return replace(recipe, calibration=replace(recipe.calibration, **fields))

    return changed


def _learned(solver: str, iterations: int) -> Change:
    learning = Learning(iterations=iterations, learning_rate=max(1e-3, 4 / iterations))
    return lambda recipe: replace(
        recipe,
        rounding=replace(recipe.rounding, solver=solver),
        learning=replace(learning, batch_size=recipe.learning.batch_size),
    )


SOLVERS: dict[str, Change] = {
    "nearest": _rounding(solver="nearest"),
    "gptq": _rounding(solver="gptq"),
    **{f"adaround-{budget}": _learned("adaround", budget) for budget in (*BUDGETS, PAPER)},
    **{f"gptq_adaround-{budget}": _learned("gptq_adaround", budget) for budget in POLISHES},
    "gptq-interval2": _calibration(_rounding(solver="gptq"), interval=2),
    "gptq-interval1": _calibration(_rounding(solver="gptq"), interval=1),
    **{
        f"gptq-samples{samples}": _calibration(_rounding(solver="gptq"), samples=samples)
        for samples in (8, 16, 64)
    },
    "gptq_adaround-interval2-100": _calibration(_learned("gptq_adaround", 100), interval=2),
    "gptq-positions16": _rounding(solver="gptq", positions=16),
    "gptq-positions256": _rounding(solver="gptq", positions=256),
    "gptq-sweeps1": _rounding(solver="gptq", sweeps=1),
    "gptq-sweeps20": _rounding(solver="gptq", sweeps=20),
    "gptq-damping0.03": _rounding(solver="gptq", damping=0.03),
    "gptq-damping0.3": _rounding(solver="gptq", damping=0.3),
    "gptq-unit_gain": _rounding(solver="gptq", unit_gain=True),
    "gptq-uncorrected": _rounding(solver="gptq", corrects=False),
    "gptq-uncorrected-unit_gain": _rounding(solver="gptq", corrects=False, unit_gain=True),
}


@dataclass(frozen=True)
class Model:
    """A model of the table, and the setting that its cells share.

    Attributes:
        name: of its cells.
        make: builds its sampler.
        recipe: of its cells, but for the solver.
        num_images, trajectories, batch_size: what quality is measured on.
    """

    name: str
    make: Callable[[], Sampler]
    recipe: Recipe
    num_images: int
    trajectories: int = 16
    batch_size: int = 64


@dataclass(frozen=True)
class Cell:
    """One quantized model of the table."""

    model: str
    solver: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.solver}-{self.seed}"


def ddpm64(folder: Path) -> Sampler:
    """Return the 63 M parameter model; 20 steps of spacing `leading` begin at timestep 285, above which it
    often breaks.
    """
    from diffusers import DDIMScheduler
    from performance import models

    sampler: Any = next(
        model for model in models(folder, Path(tempfile.mkdtemp())) if model.name == "ddpm64"
    ).make()
    sampler.scheduler = DDIMScheduler.from_config(sampler.scheduler.config, timestep_spacing="leading")
    return sampler


def known_models(num_images: int, folder: Path | None) -> dict[str, Model]:
    """Return the models of the table by name."""
    recipe = tfmq.scheme("w4a8")
    recipe = replace(recipe, calibration=replace(recipe.calibration, interval=INTERVAL, judged=0.0))
    found = [
        Model("default", lambda: open_sampler("default"), replace(recipe, learning=Learning()), num_images)
    ]
    if folder is not None:
        small = replace(
            recipe,
            calibration=Calibration(samples=8, steps=20, interval=4, batch_size=8, judged=0.0),
            learning=Learning(batch_size=8),
        )
        found.append(
            Model(
                "ddpm64", lambda: ddpm64(folder), small, max(1, num_images // 4), trajectories=4, batch_size=8
            )
        )
    return {model.name: model for model in found}


def cells() -> Iterator[Cell]:
    """Yield the table's cells: what decides the bar first, what costs most last; each seed's `nearest` before
    what builds on it.
    """
    longest = f"adaround-{BUDGETS[-1]}"
    for solver in ("nearest", *FAST, longest, "adaround-400"):
        yield Cell("default", solver, 0)
    for solver in ("nearest", "gptq", "gptq_adaround-100", "adaround-100"):
        yield Cell("ddpm64", solver, 0)
    for seed in (1, 2):
        for solver in ("nearest", *FAST, longest):
            yield Cell("default", solver, seed)
    shorter = [name for name in SOLVERS if name not in ("nearest", *FAST, longest, f"adaround-{PAPER}")]
    for seed in (0, 1, 2):
        for solver in shorter:
            if (solver, seed) != ("adaround-400", 0):
                yield Cell("default", solver, seed)
    for seed in (1, 2):
        for solver in ("nearest", "gptq"):
            yield Cell("ddpm64", solver, seed)
    yield Cell("ddpm64", "adaround-400", 0)
    yield Cell("default", f"adaround-{PAPER}", 0)


class TimedJournal(Journal):
    """A journal that also keeps what each stage took, in wall and in processor seconds."""

    def stage(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        def timed() -> dict[str, Tensor]:
            wall, processor = time.perf_counter(), time.process_time()
            tensors = compute()
            assert self.directory is not None
            write_json(
                self.directory / f"{name}.time.json",
                {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor},
            )
            return tensors

        return super().stage(name, timed)

    def spent(self, *, units: bool) -> dict[str, float]:
        """Return the time of the units, or of the stages before them."""
        assert self.directory is not None
        parts = [
            read_json(path)
            for path in sorted(self.directory.glob("*.time.json"))
            if path.name.startswith("unit_") == units
        ]
        return {key: sum(part[key] for part in parts) for key in ("seconds", "cpu_seconds")}


def same_stages(recipe: Recipe, base: Recipe) -> bool:
    """Whether all stages before the units are the same with both recipes."""
    interval = base.calibration.interval
    return (
        replace(
            recipe,
            rounding=base.rounding,
            learning=base.learning,
            calibration=replace(recipe.calibration, interval=interval),
        )
        == base
    )


def share_stages(base: Path, job: Path) -> None:
    """Give a new job the stages before the units of another one."""
    if job.exists():
        return
    shutil.rmtree(temporary := job.with_name(job.name + ".new"), ignore_errors=True)
    (temporary / "calibration").mkdir(parents=True)
    for path in base.iterdir():
        if path.is_file() and path.name != "job.json" and not path.name.startswith("unit_"):
            os.link(path, temporary / path.name)
    for path in (base / "calibration").glob("call_*"):
        os.link(path, temporary / "calibration" / path.name)
    temporary.rename(job)


def quantized(
    sampler: Sampler, recipe: Recipe, seed: int, job: Path, progress: Progress
) -> tuple[Outcome, TimedJournal]:
    """Quantize in place, in a job that goes on where it was."""
    journal = TimedJournal(
        job, {"recipe": to_dict(recipe), "seed": seed, "sampler": sampler.describe()}, resume=True
    )
    store = CalibrationStore(job / "calibration")
    outcome = quantize_denoiser(
        Job(sampler=sampler, recipe=recipe, seed=seed, store=store, journal=journal, progress=progress)
    )
    shutil.rmtree(job / "calibration" / "outputs", ignore_errors=True)
    return outcome, journal


def gain_db(outcome: Outcome) -> float:
    """Return how far the units' output errors are below those of nearest codes on the same inputs, the mean
    over units in dB; 0 where none was run, as all kept their nearest codes.
    """
    ratios = [unit.error_after / unit.error_before for unit in outcome.units if unit.error_before]
    return float(-10 * np.mean(np.log10(np.maximum(ratios, 1e-30)))) if ratios else 0.0


def measure(cell: Cell, model: Model, reference: Reference, jobs: Path, progress: Progress) -> dict[str, Any]:
    """Quantize and measure one cell."""
    base, job = (jobs / Cell(cell.model, solver, cell.seed).name for solver in ("nearest", cell.solver))
    recipe = SOLVERS[cell.solver](model.recipe)
    if cell.solver != "nearest" and same_stages(recipe, model.recipe):
        share_stages(base, job)
    sampler = reference.fresh()
    outcome, journal = quantized(sampler, recipe, cell.seed, job, progress)
    module = sampler.denoiser.module
    tfmq.execute(module, "auto")
    fidelity = reference.fidelity(reference.draw(sampler, progress))
    sqnr = reference.output_sqnr(module)
    result = {
        **{"model": cell.model, "solver": cell.solver, "seed": cell.seed},
        "iterations": recipe.learning.iterations if "adaround" in recipe.rounding.solver else 0,
        "units": journal.spent(units=True),
        "before_units": journal.spent(units=False),
        "unit_gain_db": gain_db(outcome),
        "noise_sqnr_db": float(np.mean(sqnr)),
        "noise_sqnr_by_step": sqnr,
        "psnr_db": fidelity.mean_psnr_db,
        "psnr_min_db": fidelity.min_psnr_db,
        "psnr_by_image": fidelity.psnr_db.tolist(),
        "ssim": fidelity.mean_ssim,
        "num_images": reference.num_images,
    }
    if job != base:
        shutil.rmtree(job)
    return result


def write_results(directory: Path, command: str) -> None:
    """Write all finished cells as JSON, Markdown and a picture."""
    known, solvers = list(cells()), list(SOLVERS)
    models = list(dict.fromkeys(cell.model for cell in known))
    ordered = sorted(
        known, key=lambda cell: (models.index(cell.model), solvers.index(cell.solver), cell.seed)
    )
    paths = [directory / "cells" / f"{cell.name}.json" for cell in ordered]
    rows = [read_json(path) for path in paths if path.exists()]
    if not rows:
        return
    summary = aggregate(rows)
    text = f"{table(summary)}\n{conclusions(rows, summary)}"
    write_json(
        directory / "solvers.json", {"environment": environment(command), "summary": summary, "cells": rows}
    )
    (directory / "solvers.md").write_text(text)
    draw_curves(summary, directory / "solvers.png")
    print(text)


def run(
    models: Mapping[str, Model], directory: Path, *, only: str, device: str, command: str, progress: Progress
) -> None:
    """Measure the cells that are missing and whose names contain `only`."""
    (directory / "cells").mkdir(parents=True, exist_ok=True)
    references: dict[str, Reference] = {}
    wanted = {cell for cell in cells() if cell.model in models and only in cell.name}
    bases = {Cell(cell.model, "nearest", cell.seed) for cell in wanted}
    for cell in cells():
        path = directory / "cells" / f"{cell.name}.json"
        if path.exists() or not (cell in wanted or cell in bases):
            continue
        model = models[cell.model]
        if cell.model not in references:
            found = Reference(
                model.make,
                directory / model.name,
                model.num_images,
                model.recipe.calibration.steps,
                model.trajectories,
                model.batch_size,
                device,
            )
            found.prepare(progress)
            references[cell.model] = found
        write_json(path, measure(cell, model, references[cell.model], directory / "jobs", progress))
        write_results(directory, command)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument(
        "--ddpm64",
        type=Path,
        help="folder of the 64x64 DDPM, whose load.py has build_unet, load_unet and scheduler",
    )
    parser.add_argument(
        "--only", default="", help="run only cells whose name contains this, and those that they build on"
    )
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    command = f"python benchmarks/solvers.py --num-images {options.num_images}"
    models = known_models(options.num_images, options.ddpm64)
    with quiet(), shown_progress() as progress:
        run(
            models,
            options.output_dir,
            only=options.only,
            device=options.device,
            command=command,
            progress=progress,
        )
    write_results(options.output_dir, command)


if __name__ == "__main__":
    main()
