"""One leaderboard: models x methods x bits, every cell a quantized model measured against full precision.

    python benchmarks/leaderboard.py                            # all that is missing, of the models here
    python benchmarks/leaderboard.py --models text --only w4a8  # some of it
    python benchmarks/leaderboard.py --models NAME=FILE.py:FUNCTION
    python benchmarks/leaderboard.py --write-docs               # docs/leaderboard.md from the cells

The third measures another model: FILE.py:FUNCTION returns a sampler; a directory of a pipeline will do too.

A cell is quantized as `tfmq quantize` does it, saved, opened again and measured: bytes on disk; PSNR and SSIM
of images to those of full precision from the same noise, which calibration has not seen, nor the prompts;
adherence, where the model brings a judge; a Frechet distance to full precision's images; the error of
temporal features; processor seconds of the calibration; milliseconds of a step.

A finished cell is a JSON file and stays; the script goes on with what is missing, and a quantized model that
was not measured yet is measured. It can be killed at any time. Cells measured under other settings
(`--num-images`, `--samples`, ..., other weights) are refused, not mixed: give them another `--output-dir`. A
step that was timed while others used the machine is marked, and `--time` times it again.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from contestants import KNOWN, Contestant, find
from leaderboard_page import FULL, page, read_cells
from methods import BITS, METHODS, Cell, cells
from names import names_of
from reference import Reference, environment
from scoring import Scorer, executed, fastest_step, full_precision_step

from tfmq.artifact import holds_quantized, stored_bytes
from tfmq.calibration.trajectory import CalibrationError
from tfmq.cli.progress import shown_progress
from tfmq.errors import MissingExtraError
from tfmq.evaluation.distribution.extractors import EXTRACTORS
from tfmq.evaluation.sampling import SamplingError
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.progress import Progress
from tfmq.storage.atomic import read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "leaderboard", ROOT / "docs" / "leaderboard.md"


@dataclass(frozen=True)
class Settings:
    """What all cells of a model share beside the model."""

    num_images: int
    extractor: str
    iterations: int | None = None
    batch_size: int = 50


class Bench:
    """Measures the cells of one model in `directory`."""

    def __init__(self, model: Contestant, settings: Settings, directory: Path, progress: Progress) -> None:
        self.model = model
        self.settings = settings
        self.directory = directory
        self.progress = progress

    @cached_property
    def described(self) -> dict[str, Any]:
        """What figures depend on, as a cell keeps it."""
        own = {
            "num_images": self.settings.num_images,
            "extractor": self.settings.extractor,
            "iterations": self.settings.iterations,
        }
        return {**own, **self.model.describe()}

    @cached_property
    def reference(self) -> Reference:
        """Full precision's images, drawn once."""
        folder = (
            self.directory
            / "references"
            / f"{self.model.name}-{self.described['weights']}-{self.described['prompts']}"
        )
        running = self.model.running
        folder = folder.with_name(f"{folder.name}-{running.steps}-{running.guidance}")
        found = Reference(
            self.model.sampler,
            folder,
            self.settings.num_images,
            steps=running.steps,
            batch_size=self.settings.batch_size,
        )
        found.prepare_images(self.progress)
        return found

    @cached_property
    def scorer(self) -> Scorer:
        """What measures images."""
        return Scorer(self.model, self.reference, self.settings.extractor)

    def path(self, name: str) -> Path:
        """Return where a cell stays."""
        return self.directory / f"{name}.json"

    def finished(self, name: str) -> bool:
        """Whether a cell is there.

        Raises:
            SystemExit: it was measured under other settings.
        """
        if not self.path(name).exists():
            return False
        before = read_json(self.path(name))["settings"]
        changed = [
            f"{key} {before.get(key)}, now {value}"
            for key, value in self.described.items()
            if before.get(key) != value
        ]
        if changed:
            raise SystemExit(
                f"error: {self.path(name).name} has other settings ({'; '.join(changed)}); "
                "give another --output-dir, or delete it"
            )
        return True

    def keep(self, name: str, found: Mapping[str, Any]) -> None:
        """Write a finished cell."""
        write_json(
            self.path(name),
            {
                "model": self.model.name,
                "settings": self.described,
                **environment("benchmarks/leaderboard.py"),
                **found,
            },
        )

    def artifact(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """Return the directory of a quantized model and what making it took; made anew where a kill left it
        unfinished.
        """
        folder = self.directory / "artifacts" / cell.name
        note = folder.with_name(f"{cell.name}.json")
        if note.exists() and holds_quantized(folder) and read_json(note)["settings"] == self.described:
            return folder, read_json(note)
        for rest in (note, *folder.parent.glob(f"{cell.name}*")):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink(missing_ok=True)
        recipe = self.model.recipe(cell.recipe(), iterations=self.settings.iterations)
        began = time.process_time()
        report = self.model.quantize(recipe, seed=cell.seed, folder=folder, progress=self.progress)
        spent = {
            "cpu_seconds": time.process_time() - began,
            "fp32_bytes": report["bytes"]["fp32"],
            "scheme": report["scheme"],
        }
        write_json(note, {**spent, "settings": self.described})
        return folder, spent

    def measure(self, cell: Cell) -> None:
        """Quantize, measure and keep one cell; a model that draws no images is a result too."""
        row, scorer = {"bits": cell.bits, "method": cell.method, "seed": cell.seed}, self.scorer
        try:
            folder, spent = self.artifact(cell)
            sampler = self.model.quantized(folder)
            temporal = scorer.temporal(sampler)
            backend = executed(sampler)
            images = self.reference.draw(sampler, self.progress)
        except (CalibrationError, SamplingError) as error:
            self.keep(cell.name, {**row, "failed": str(error)})
            return
        measured = {
            "scheme": spent["scheme"],
            "bytes": {"disk": stored_bytes(folder), "fp32": spent["fp32_bytes"]},
            "cpu_seconds": spent["cpu_seconds"],
            **scorer.fidelity(images),
            "adherence": scorer.adherence(images),
            "temporal": temporal,
            "drawn_by": backend,
            "step": fastest_step(sampler, self.reference) if cell.seed == 0 else None,
        }
        self.keep(cell.name, {**row, **measured})

    def measure_full_precision(self) -> None:
        """Keep what full precision itself shows and costs."""
        scorer = self.scorer
        size = sum(4 * parameter.numel() for parameter in self.reference.sampler.denoiser.module.parameters())
        measured = {
            "bytes": {"disk": size, "fp32": size},
            "adherence": scorer.adherence(self.reference.images),
            "step": full_precision_step(self.reference),
        }
        self.keep(f"{self.model.name}-{FULL}", {"bits": None, "method": FULL, "seed": 0, **measured})

    def time_again(self, name: str) -> None:
        """Time the step of a finished cell that was timed under load, where its quantized model is still
        there.
        """
        found = read_json(self.path(name)) if self.path(name).exists() else {}
        folder = self.directory / "artifacts" / name
        if not found.get("step") or found["step"]["clean"]:
            return
        if found["method"] == FULL:
            step = full_precision_step(self.reference)
        elif holds_quantized(folder):
            step = fastest_step(self.model.quantized(folder), self.reference)
        else:
            print(
                f"skipped: {name}: its quantized model is not in {folder.parent.name}",
                file=sys.stderr,
                flush=True,
            )
            return
        write_json(self.path(name), {**found, "step": step})


def run(model: Contestant, options: argparse.Namespace, progress: Progress) -> None:
    """Measure the cells of one model that are missing and wanted."""
    settings = Settings(options.num_images, options.extractor, options.iterations, options.batch_size)
    bench = Bench(model, settings, options.output_dir, progress)
    wanted = [
        cell
        for cell in cells([model.name], methods=options.methods, bits=options.bits)
        if options.only in cell.name
    ]
    full = f"{model.name}-{FULL}"
    if not bench.finished(full):
        bench.measure_full_precision()
    for cell in wanted:
        if options.deadline is not None and time.monotonic() > options.deadline:
            print(
                f"the time is up before {cell.name}; the same command goes on there",
                file=sys.stderr,
                flush=True,
            )
            return
        if not bench.finished(cell.name):
            print(cell.name, file=sys.stderr, flush=True)
            bench.measure(cell)
    if options.time:
        for name in (full, *(cell.name for cell in wanted)):
            bench.time_again(name)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Return the command line, parsed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument(
        "--models",
        default=",".join(KNOWN),
        help="names, directories of pipelines, or FILE.py:FUNCTION; NAME= before one names it",
    )
    parser.add_argument(
        "--methods", type=names_of(METHODS), default=list(METHODS), help="some of " + ", ".join(METHODS)
    )
    parser.add_argument("--bits", type=names_of(BITS), default=list(BITS), help="some of " + ", ".join(BITS))
    parser.add_argument(
        "--only", default="", help="run only cells whose name, MODEL-BITS-METHOD-SEED, contains this"
    )
    parser.add_argument("--num-images", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--samples", type=int, help="images of a calibration; by default the model's")
    parser.add_argument("--iterations", type=int, help="of AdaRound, instead of the preset's")
    parser.add_argument("--steps", type=int, help="denoising steps; by default the model's, 50 for another's")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the model's")
    parser.add_argument(
        "--prompts", type=Path, help="file of prompts to measure a text-to-image model on, one a line"
    )
    parser.add_argument("--calibration-prompts", type=Path, help="file of prompts to calibrate it on")
    parser.add_argument("--extractor", choices=[*EXTRACTORS], default="efficientnet-lite0")
    parser.add_argument("--minutes", type=float, help="start no cell after so long")
    parser.add_argument(
        "--time", action="store_true", help="time again what was timed while others used the machine"
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write docs/leaderboard.md from the cells in benchmarks/results, and measure nothing",
    )
    options = parser.parse_args(given)
    options.deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    return options


def main() -> None:
    options = arguments()
    if options.write_docs:
        PAGE.write_text(page(read_cells(options.output_dir)), encoding="utf-8")
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    with quiet(), shown_progress() as progress, tempfile.TemporaryDirectory() as cache:
        # What OpenVINO converts for each cell would only fill the user's cache.
        os.environ.setdefault("TFMQ_CACHE", cache)
        for text in options.models.split(","):
            try:
                model = find(text, options)
                if model is None:
                    print(
                        f"skipped: there is no model {text} here; training/README.md says how it is made",
                        file=sys.stderr,
                        flush=True,
                    )
                    continue
                run(model, options, progress)
            except (ValueError, MissingExtraError) as error:
                raise SystemExit(f"error: {error}") from error
    print(page(read_cells(options.output_dir)))


if __name__ == "__main__":
    main()
