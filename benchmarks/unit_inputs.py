"""What is lost when units learn side by side: inputs from the network quantized so far against full-precision
ones.

    python benchmarks/unit_inputs.py --output-dir benchmarks/results/unit_inputs

Quantizes the embedded model with either value of `rounding.inputs`, everything else equal, and compares the
images with those of full precision from the same noise. A finished cell is a JSON file and is kept; the
script goes on with what is missing, and prints the table.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch

import tfmq
from tfmq.cli.progress import shown_progress
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.progress import Progress
from tfmq.targets import open_sampler

STEPS = 50
# The noise of the measured images is none that calibration saw.
IMAGE_SEED = 1234
# Units learn from each fifth step, as in the published experiments.
INTERVAL = 5


def measure(scheme: str, inputs: str, seed: int, full: np.ndarray, progress: Progress) -> dict[str, Any]:
    """Quantize and measure one cell."""
    recipe = tfmq.scheme(scheme)
    calibration, rounding = (
        replace(recipe.calibration, interval=INTERVAL),
        replace(recipe.rounding, inputs=inputs),
    )  # type: ignore[arg-type]
    recipe = replace(recipe, calibration=calibration, rounding=rounding)
    sampler = open_sampler("default")
    tfmq.quantize(sampler, recipe, seed=seed, progress=progress)
    tfmq.execute(sampler.denoiser.module, "auto")
    images = draw(sampler, len(full), steps=STEPS, seed=IMAGE_SEED, batch_size=64, progress=progress)
    fidelity = paired_fidelity(full, images)
    return {
        "scheme": scheme,
        "inputs": inputs,
        "seed": seed,
        "images": len(full),
        "psnr_db": fidelity.mean_psnr_db,
        "psnr_min_db": fidelity.min_psnr_db,
        "ssim": fidelity.mean_ssim,
        "versions": {"torch": torch.__version__, "tfmq": tfmq.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=64)
    parser.add_argument("--schemes", default="w4a8")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    cells = [
        (s, inputs, int(seed))
        for seed in options.seeds.split(",")
        for s in options.schemes.split(",")
        for inputs in ("quantized", "full")
    ]
    full = None
    with quiet(), shown_progress() as progress:
        for scheme, inputs, seed in cells:
            path = options.output_dir / f"{scheme}-{inputs}-{seed}.json"
            if path.exists():
                continue
            if full is None:
                full = draw(
                    open_sampler("default"),
                    options.num_images,
                    steps=STEPS,
                    seed=IMAGE_SEED,
                    batch_size=64,
                    progress=progress,
                )
            path.write_text(json.dumps(measure(scheme, inputs, seed, full, progress), indent=1) + "\n")
    print("| bits | inputs | seeds | PSNR dB mean | worst image | SSIM |\n|---|---|---|---|---|---|")
    found = [json.loads(path.read_text()) for path in sorted(options.output_dir.glob("*.json"))]
    for scheme in options.schemes.split(","):
        for inputs in ("quantized", "full"):
            rows = [row for row in found if (row["scheme"], row["inputs"]) == (scheme, inputs)]
            if rows:
                average = {key: mean(row[key] for row in rows) for key in ("psnr_db", "ssim")}
                worst = min(row["psnr_min_db"] for row in rows)
                print(
                    f"| {scheme} | {inputs} | {len(rows)} | {average['psnr_db']:.2f} "
                    f"| {worst:.2f} | {average['ssim']:.4f} |"
                )


if __name__ == "__main__":
    main()
