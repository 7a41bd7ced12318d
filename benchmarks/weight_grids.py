"""What grids and groups of weights are worth: images of models quantized by several schemes, beside full
precision's from the same noise, and bytes of the tensors.

    python benchmarks/weight_grids.py dit --schemes transformer_w4a8,group_w4a8,fp4_w4a8
    python benchmarks/weight_grids.py default --schemes w4a8,group_w4a8,fp4_w4a8

Prints a row for each scheme: PSNR to full precision of images from noise that calibration has not seen (mean,
standard error and median), the error of the output of layers with measured grids in dB below the output,
bytes, which grids layers have, and seconds of the job on a few images, units learning from every fourth step.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace
from math import log10
from typing import Any

import numpy as np

import tfmq
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.nn.plan import packed_layers
from tfmq.reconstruction.solvers import SOLVERS, SolverName
from tfmq.targets import open_sampler

STEPS, SEED = 20, 1234
GUIDANCE = {"text": 3.0, "dit": 2.0}


def opened(model: str) -> Any:
    """Return the sampler of a model."""
    options = {"guidance_scale": GUIDANCE[model]} if model in GUIDANCE else {}
    return open_sampler(model, options=options)


def row(model: str, scheme: str, full: np.ndarray, *, samples: int, solver: SolverName | None) -> str:
    """Quantize and measure; return a row of the table."""
    recipe = tfmq.scheme(scheme)
    calibration = replace(recipe.calibration, samples=samples, steps=STEPS, interval=4, judged=0.0)
    sampler, began = opened(model), time.perf_counter()
    recipe = replace(recipe, calibration=calibration)
    if solver is not None:
        recipe = replace(recipe, rounding=replace(recipe.rounding, solver=solver))
    report = tfmq.quantize(
        sampler, recipe, components="denoiser" if hasattr(sampler, "pipeline") else None
    ).report
    seconds = time.perf_counter() - began
    module = sampler.denoiser.module
    grids = Counter(
        f"{getattr(layer.format, 'name', layer.format.bits)}{f'/{layer.group}' if layer.group else ''}"
        for layer in packed_layers(module).values()
    )
    kept = [found["candidates"][found["kept"]]["error"] for found in report.get("grids", ())]
    errors = f"{-10 * log10(float(np.median(kept))):.1f}" if kept else "-"
    tfmq.execute(module, "torch")
    psnr = np.asarray(paired_fidelity(full, draw(sampler, len(full), steps=STEPS, seed=SEED)).psnr_db)
    spread = psnr.std(ddof=1) / len(psnr) ** 0.5
    named = ", ".join(f"{name}: {count}" for name, count in sorted(grids.items()))
    return (
        f"| {model} | `{scheme}` | {psnr.mean():.2f} ± {spread:.2f} | {np.median(psnr):.2f} | {errors} "
        f"| {report['bytes']['quantized'] / 1e6:.3f} | {named} | {seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemes", default="transformer_w4a8,group_w4a8,fp4_w4a8")
    parser.add_argument("--solver", choices=SOLVERS, help="of the units, instead of the scheme's")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    print("| model | scheme | PSNR, dB | median | layers, dB | MB | grids | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for model in options.models:
        with quiet():
            full = draw(opened(model), options.images, steps=STEPS, seed=SEED)
            for scheme in options.schemes.split(","):
                print(row(model, scheme, full, samples=options.samples, solver=options.solver), flush=True)


if __name__ == "__main__":
    main()
