"""What each part of the method is worth, on one model: bits x {rtn, brecq, gptq, tfmq with block, cache,
selection}.

    python benchmarks/ablation.py --output-dir runs/ablation --real mnist/t10k-images-idx3-ubyte.gz

Every cell quantizes a fresh copy of the model and measures, against full precision from the same noise:
relative error and cosine of the temporal features by timestep and the mismatched ones, SQNR of the predicted
noise (or velocity) by step along the full-precision trajectory, PSNR and SSIM of final images, and the
Frechet distance of the images to full-precision ones and, with `--real`, to real ones. A finished cell is a
JSON file and is kept; the script goes on with what is missing, so it can run in pieces. W4A8 has three seeds,
the others one.

`brecq` is block reconstruction by AdaRound; `gptq` has the solver of the tfmq rows and, like `brecq`, nothing
that maintains temporal features.

The Frechet distance is torchmetrics' on a stated extractor: pixels averaged over 4x4 windows (8x8x3 = 192
features of a 32x32 image). It is no FID and compares with nothing but itself.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import gptq
from reference import Reference, environment, machine
from torch import Tensor, nn

import tfmq
from tfmq.cli.progress import shown_progress
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.progress import Progress
from tfmq.recipes.recipe import Recipe, Temporal
from tfmq.targets import open_sampler

DOCS = Path(__file__).parents[1] / "docs"
SCHEMES = ("w4a8", "w8a8", "w4a32")
METHODS = ("rtn", "brecq", "tfmq_cache", "tfmq_block", "tfmq_selected")
# These say what a part is worth, and one seed says it.
PARTS = ("gptq", "tfmq_cache_fp16")
# As the table and the pictures have them.
ROWS = ("rtn", "brecq", "gptq", "tfmq_block", "tfmq_cache", "tfmq_cache_fp16", "tfmq_selected")
STEPS = 50
# Units of every cell learn from each fifth step, as the published experiments do; the presets of today take
# more.
INTERVAL = 5
AVERAGED = ("psnr_db", "ssim", "output_sqnr_db", "frechet_to_full_precision")
# None where a cell was not measured: without real images, or on another machine than the table is made on.
OPTIONAL = ("frechet_to_real", "cpu_seconds")


@dataclass(frozen=True)
class Cell:
    """One quantized model of the table."""

    scheme: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.scheme}-{self.method}-{self.seed}"

    def recipe(self, iterations: int | None) -> Recipe:
        """Return the cell's recipe; with `iterations`, AdaRound of so many steps takes the place of the
        presets' solver.
        """
        if self.method in ("rtn", "brecq"):
            recipe = tfmq.scheme(f"{self.method}_{self.scheme}")
        elif self.method == "gptq":
            recipe = gptq(tfmq.scheme(self.scheme))
        else:
            maintenance, table = (
                self.method.removeprefix("tfmq_").partition("_")[0],
                "float16" if self.method.endswith("fp16") else "int8",
            )
            recipe = tfmq.scheme(self.scheme)
            recipe = replace(
                recipe,
                temporal=Temporal(maintenance=maintenance, table=table, learning=recipe.temporal.learning),
            )  # type: ignore[arg-type]
        if iterations is not None and recipe.rounding.solver != "nearest":
            rounding, learning = (
                replace(recipe.rounding, solver="adaround"),
                replace(recipe.learning, iterations=iterations),
            )
            recipe = replace(recipe, rounding=rounding, learning=learning)
        # Each method as it is, whatever it draws.
        return replace(recipe, calibration=replace(recipe.calibration, interval=INTERVAL, judged=0.0))


def cells() -> Iterator[Cell]:
    """Yield the table's cells, the ones that matter most first."""
    for seed in (0, 1, 2):
        for method in METHODS:
            yield Cell("w4a8", method, seed)
    for scheme in SCHEMES[1:]:
        for method in METHODS:
            yield Cell(scheme, method, 0)
    for method in PARTS:
        yield Cell("w4a8", method, 0)


class PooledPixels(nn.Module):
    """The stated extractor: mean over 4x4 windows of a uint8 image `[N, 3, H, W]`, flattened."""

    num_features = 192

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(images.float() / 255, images.shape[-1] // 8).flatten(1)


def frechet(images: np.ndarray, others: np.ndarray) -> float:
    """Return torchmetrics' Frechet distance of two sets of uint8 images `[N, H, W, C]` on `PooledPixels`."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(
        feature=PooledPixels(), input_img_size=(3, images.shape[1], images.shape[2])
    ).set_dtype(torch.float64)
    for array, real in ((others, True), (images, False)):
        metric.update(torch.from_numpy(array).permute(0, 3, 1, 2), real=real)
    return float(metric.compute())


def measure(
    cell: Cell, reference: Reference, real: np.ndarray | None, iterations: int | None, progress: Progress
) -> dict[str, Any]:
    """Quantize and measure one cell."""
    sampler = reference.fresh()
    recipe = cell.recipe(iterations)
    # Processor time: cells run side by side, one thread each.
    began = time.process_time()
    report = tfmq.quantize(sampler, recipe, seed=cell.seed, progress=progress).report
    seconds = time.process_time() - began
    module = sampler.denoiser.module
    disturbed = temporal_disturbance(reference.sampler, module)
    tfmq.execute(module, "auto")  # what a user would run
    images = reference.draw(sampler, progress)
    fidelity = reference.fidelity(images)
    np.save(reference.directory / f"{cell.name}.npy", images[:32])
    sqnr = reference.output_sqnr(module)
    return {
        "scheme": cell.scheme,
        "method": cell.method,
        "seed": cell.seed,
        "solver": recipe.rounding.solver,
        "iterations": recipe.learning.iterations if recipe.rounding.solver == "adaround" else 0,
        "temporal_iterations": recipe.temporal.learning.iterations if cell.method.startswith("tfmq") else 0,
        "machine": machine(),
        "cpu_seconds": seconds,
        "bytes": report["bytes"],
        "psnr_db": fidelity.mean_psnr_db,
        "psnr_min_db": fidelity.min_psnr_db,
        "ssim": fidelity.mean_ssim,
        "output_sqnr_db": float(np.mean(sqnr)),
        "output_sqnr_by_step": sqnr,
        "temporal": {
            "mean_relative_error": disturbed.mean_relative_error,
            "max_relative_error": disturbed.max_relative_error,
            "mismatches": disturbed.mismatches,
            "timesteps": disturbed.timesteps.tolist(),
            "relative_error_by_step": torch.stack(list(disturbed.relative_error.values()))
            .mean(dim=0)
            .tolist(),
            "cosine_by_step": torch.stack(list(disturbed.cosine.values())).mean(dim=0).tolist(),
        },
        "frechet_to_full_precision": frechet(images, reference.images),
        "frechet_to_real": frechet(images, real) if real is not None else None,
    }


def read_cells(directory: Path) -> list[dict[str, Any]]:
    """Return the finished cells in the order of the table."""
    ordered = sorted(
        cells(), key=lambda cell: (SCHEMES.index(cell.scheme), ROWS.index(cell.method), cell.seed)
    )
    paths = {cell.name: directory / f"{cell.name}.json" for cell in ordered}
    return [json.loads(path.read_text()) for path in paths.values() if path.exists()]


def aggregate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row for each scheme and method: means over seeds, and the standard deviation of PSNR over
    them.

    Processor time is that of cells measured on this machine.
    """
    result = []
    rows = [row if row["machine"] == machine() else {**row, "cpu_seconds": None} for row in rows]
    for key in dict.fromkeys((row["scheme"], row["method"]) for row in rows):
        group = [row for row in rows if (row["scheme"], row["method"]) == key]
        mean: dict[str, Any] = {name: float(np.mean([row[name] for row in group])) for name in AVERAGED}
        temporal = {
            name: float(np.mean([row["temporal"][name] for row in group]))
            for name in ("mean_relative_error", "max_relative_error")
        }
        mean["psnr_std_db"] = float(np.std([row["psnr_db"] for row in group]))
        for name in OPTIONAL:
            known = [row[name] for row in group if row[name] is not None]
            mean[name] = float(np.mean(known)) if known else None
        mismatches = float(np.mean([row["temporal"]["mismatches"] for row in group]))
        result.append(
            {
                "scheme": key[0],
                "method": key[1],
                "seeds": len(group),
                **mean,
                **temporal,
                "mismatches": mismatches,
            }
        )
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """Return the aggregated rows as a Markdown table."""
    lines = [
        (
            "| bits | method | seeds | temporal error mean / max | mismatched | output "
            "SQNR dB | PSNR dB | SSIM | Frechet to FP / real | CPU seconds |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f" ± {row['psnr_std_db']:.2f}" if row["seeds"] > 1 else ""
        real = "" if row["frechet_to_real"] is None else f" / {row['frechet_to_real']:.3f}"
        lines.append(
            f"| {row['scheme'].upper()} | {row['method']} | {row['seeds']} | "
            f"{row['mean_relative_error']:.4f} / {row['max_relative_error']:.4f} "
            f"| {row['mismatches']:.1f} | {row['output_sqnr_db']:.2f} | "
            f"{row['psnr_db']:.2f}{spread} | {row['ssim']:.4f} "
            f"| {row['frechet_to_full_precision']:.4f}{real} | "
            f"{'' if row['cpu_seconds'] is None else round(row['cpu_seconds'])} |"
        )
    return "\n".join(lines) + "\n"


def draw_curves(rows: list[dict[str, Any]], path: Path, scheme: str = "w4a8") -> None:
    """Draw temporal error and noise SQNR by timestep for every method of `scheme`, seed 0."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for row in rows:
        if row["scheme"] == scheme and row["seed"] == 0:
            steps = row["temporal"]["timesteps"]
            left.plot(steps, row["temporal"]["relative_error_by_step"], label=row["method"], linewidth=1.6)
            right.plot(steps, row["output_sqnr_by_step"][::-1], label=row["method"], linewidth=1.6)
    left.set(
        yscale="log",
        xlabel="timestep",
        ylabel="relative error, mean over features",
        title=f"temporal features, {scheme.upper()}",
    )
    right.set(xlabel="timestep", ylabel="dB", title=f"SQNR of the prediction, {scheme.upper()}")
    for axes in (left, right):
        axes.grid(True, color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def write_results(directory: Path, options: argparse.Namespace) -> None:
    rows = read_cells(directory)
    if not rows:
        return
    summary = aggregate(rows)
    command = (
        f"python benchmarks/ablation.py --num-images {options.num_images} "
        f"--iterations {options.iterations or 'preset'}"
    )
    described = {**environment(command), "model": options.model, "steps": STEPS}
    (directory / "ablation.json").write_text(
        json.dumps({"environment": described, "summary": summary, "cells": rows}, indent=1) + "\n"
    )
    (directory / "ablation.md").write_text(table(summary))
    print(table(summary))


def write_docs(directory: Path) -> None:
    """Put the table of a directory of results, and a picture of its cells, into the documentation."""
    start, end = "<!-- table: benchmarks/results/ablation/ablation.md -->\n", "<!-- end of table -->"
    page = DOCS / "ablation.md"
    text = page.read_text(encoding="utf-8")
    before, after = text.index(start) + len(start), text.index(end)
    page.write_text(
        text[:before] + (directory / "ablation.md").read_text(encoding="utf-8") + text[after:],
        encoding="utf-8",
    )
    measured = json.loads((directory / "ablation.json").read_text(encoding="utf-8"))
    draw_curves(measured["cells"], DOCS / "figures" / "ablation.png")


def real_images(path: Path, num_images: int) -> np.ndarray:
    """Return real training images, uint8 `[N, H, W, C]`, coloured as the default model was trained on
    them.
    """
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    from train_default_model import colour, read_digits

    images = colour(read_digits(path)[:num_images], torch.Generator().manual_seed(0))
    return ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model", default="default")
    parser.add_argument("--num-images", type=int, default=256)
    parser.add_argument(
        "--iterations", type=int, help="AdaRound with so many steps a unit, instead of the presets' solver"
    )
    parser.add_argument(
        "--real", type=Path, help="gzipped IDX file of the digits that the default model was trained on"
    )
    parser.add_argument("--only", default="", help="run only cells whose name contains this")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="put the table and the picture of what is measured into docs/, and measure nothing",
    )
    options = parser.parse_args()
    if options.write_docs:
        write_docs(options.output_dir)
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    real = real_images(options.real, 10_000) if options.real else None
    reference = Reference(
        lambda: open_sampler(options.model), options.output_dir, options.num_images, steps=STEPS
    )
    with quiet(), shown_progress() as progress:
        reference.prepare(progress)
        for cell in cells():
            path = options.output_dir / f"{cell.name}.json"
            if options.only not in cell.name or path.exists():
                continue
            result = measure(cell, reference, real, options.iterations, progress)
            path.write_text(json.dumps(result, indent=1) + "\n")
            write_results(options.output_dir, options)
    write_results(options.output_dir, options)


if __name__ == "__main__":
    main()
