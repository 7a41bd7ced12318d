"""What a low-rank branch beside 4-bit codes is worth, alone and together with rescaled inputs (SVDQuant).

    python benchmarks/branch.py dit default --bits w4a4

Prints, for each model and for neither, either and both: SQNR of what is predicted along trajectories of full
precision, PSNR to full precision of images, both from noise that calibration has not seen, the latter's
difference to rescaling alone image by image, layers with a branch, bytes of the quantized tensors, and
processor milliseconds of a step in OpenVINO at batch 1, on one thread. The recipe is that of `svd_` and the
bits in all rows, on `--samples` images of 20 steps, units learning from every fourth.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from short import opened, quantize, with_error

import tfmq
from tfmq.calibration.trajectory import recorded_calls
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.recipes.recipe import Branch, Recipe, Rescaling

STEPS, SEED, CALLS, FOLLOWED = 20, 1234, 100, 2
GUIDANCE = {"dit": 3.0}
NEITHER: dict[str, Any] = {"branch": Branch(splitters=()), "rescaling": Rescaling()}
CHANGES: dict[str, dict[str, Any]] = {
    "neither": NEITHER,
    "rescaling": {"branch": NEITHER["branch"]},
    "branch": {"rescaling": NEITHER["rescaling"]},
    "both": {},
    "alternating": {"branch": Branch(splitters=("alternating",))},
}


def recipe_of(model: str, bits: str, change: str, rank: int, samples: int) -> Recipe:
    """Return the recipe of a row."""
    recipe = tfmq.scheme(f"svd_{bits}")
    calibration = replace(
        recipe.calibration,
        samples=samples,
        batch_size=min(samples, recipe.calibration.batch_size),
        steps=STEPS,
        interval=4,
        judged=0.0,
        guidance_scale=GUIDANCE.get(model),
    )
    weights = replace(recipe.weights, rank=rank)
    return replace(recipe, calibration=calibration, weights=weights, **CHANGES[change])


def milliseconds(sampler: Any) -> float:
    """Return the median processor time of a step in OpenVINO at batch 1, at a calibrated timestep: what else
    runs here does not count.
    """
    module, example = sampler.denoiser.module, sampler.example().resized(1)
    tfmq.execute(module, "openvino", options=tfmq.Options(threads=1))
    known = module.tfmq_steps.timesteps
    inputs = Inputs(example.sample, known[len(known) // 2].to(example.timestep)[None], example.conditions)
    times = []
    with torch.no_grad():
        for _ in range(CALLS + 3):
            began = time.process_time()
            sampler.denoiser(inputs)
            times.append(time.process_time() - began)
    return 1e3 * float(np.median(times[3:]))


@torch.no_grad()
def followed(sampler: Any) -> list[Inputs]:
    """Return the calls of some images."""
    calls: list[Inputs] = []
    with recorded_calls(sampler.denoiser, calls.append):
        sampler.run(range(FOLLOWED), steps=STEPS, seed=SEED)
    return calls


@torch.no_grad()
def predictions(denoiser: Denoiser, calls: list[Inputs]) -> torch.Tensor:
    """Return what is predicted in some calls."""
    return torch.cat([denoiser(call) for call in calls])


def row(model: str, change: str, recipe: Recipe, *, images: int, known: dict[str, np.ndarray]) -> str:
    """Quantize and measure; return a row of the table. `known` has the images of full precision, and gets the
    PSNR of these.
    """
    full = opened(model, GUIDANCE)
    calls = followed(full)
    sampler, began = opened(model, GUIDANCE), time.process_time()
    quantize(sampler, recipe)
    seconds = time.process_time() - began
    layers = packed_layers(sampler.denoiser.module)
    branches = sum(layer.branch is not None for layer in layers.values())
    size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.state_dict().values())
    tfmq.execute(sampler.denoiser.module, "torch")
    signal = sqnr_db(predictions(full.denoiser, calls), predictions(sampler.denoiser, calls))
    drawn = draw(sampler, images, steps=STEPS, seed=SEED)
    psnr = known[change] = np.asarray(paired_fidelity(known["full"], drawn).psnr_db)
    gain = with_error(psnr - known.get("rescaling", psnr), sign=True)
    return (
        f"| {model} | {recipe.name} | {change} | {recipe.weights.rank} | {signal:.2f} "
        f"| {with_error(psnr)} | {gain} "
        f"| {branches} of {len(layers)} | {size} | {milliseconds(sampler):.2f} | {seconds:.0f} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--bits", default="w4a4", choices=("w4a4", "w4a8"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rows", nargs="+", default=["rescaling", "branch", "both"], choices=CHANGES)
    options = parser.parse_args()
    names = ("model", "recipe", "method", "rank", "SQNR, dB", "PSNR, dB", "over rescaling", "branches")
    print(f"| {' | '.join((*names, 'bytes', 'ms a step', 'CPU s'))} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for model in options.models:
        with quiet():
            known = {"full": draw(opened(model, GUIDANCE), options.images, steps=STEPS, seed=SEED)}
            for change in options.rows:
                recipe = recipe_of(model, options.bits, change, options.rank, options.samples)
                print(row(model, change, recipe, images=options.images, known=known), flush=True)


if __name__ == "__main__":
    main()
