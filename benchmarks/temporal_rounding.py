"""What the rounding of the temporal block is worth: TIAR by AdaRound, as in the paper, and in closed form.

    python benchmarks/temporal_rounding.py default text dit

Prints, for each model and solver: the mean relative error of temporal features, of the block alone and of
what serves them in the end, PSNR to full precision of images from noise that calibration has not seen, and
seconds of the whole job on 16 images of 20 steps, units learning from every fourth.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from short import opened, quantize, with_error

import tfmq
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.recipes.stages import Maintenance
from tfmq.reconstruction.solvers import Rounding

IMAGES, STEPS, SEED = 24, 20, 1234
GUIDANCE = {"text": 3.0, "dit": 3.0}
SCHEMES = {"dit": "transformer_w4a8"}
SCENES = Path(__file__).parent / "prompts" / "scenes.txt"


def drawn(sampler: Any) -> np.ndarray:
    """Return images of prompts that calibration has not seen, where it draws from such."""
    if getattr(sampler, "takes_prompts", False):
        sampler.prompts = tuple(SCENES.read_text(encoding="utf-8").splitlines()[:IMAGES])
    return draw(sampler, IMAGES, steps=STEPS, seed=SEED)


def row(model: str, solver: str, maintenance: Maintenance, full: np.ndarray) -> str:
    """Quantize and measure; return a row of the table."""
    recipe = tfmq.scheme(SCHEMES.get(model, "w4a8"))
    calibration = replace(
        recipe.calibration,
        samples=16,
        steps=STEPS,
        interval=4,
        judged=0.0,
        guidance_scale=GUIDANCE.get(model),
    )
    temporal = replace(recipe.temporal, rounding=Rounding(solver=solver), maintenance=maintenance)
    sampler, began = opened(model, GUIDANCE), time.perf_counter()
    report = quantize(sampler, replace(recipe, calibration=calibration, temporal=temporal))
    seconds = time.perf_counter() - began
    tfmq.execute(sampler.denoiser.module, "torch")
    psnr = np.asarray(paired_fidelity(full, drawn(sampler)).psnr_db)
    error = report["temporal"]["mean_relative_error"]
    return (
        f"| {model} | `{solver}` | {maintenance} | {error:.4f} | {with_error(psnr)} "
        f"| {np.median(psnr):.2f} | {seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    options = parser.parse_args()
    print("| model | solver | maintenance | temporal error | PSNR, dB | median | seconds |")
    print("|---|---|---|---|---|---|---|")
    for model in options.models:
        with quiet():
            full = drawn(opened(model, GUIDANCE))
            for solver in ("adaround", "gptq"):
                for maintenance in ("cache", "block"):
                    print(row(model, solver, maintenance, full), flush=True)


if __name__ == "__main__":
    main()
