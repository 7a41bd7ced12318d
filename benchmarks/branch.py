"""What a low-rank branch beside 4-bit codes is worth, alone and together with rescaled inputs (SVDQuant).

    python benchmarks/branch.py dit default --bits w4a4

Prints, for each model and for neither, either and both: PSNR to full precision of images from noise that
calibration has not seen, its difference to rescaling alone image by image, layers with a branch, bytes
of the quantized tensors, and milliseconds a step in OpenVINO at batch 1. The recipe is that of `svd_` and the
bits in all rows, on 8 images of 20 steps, units learning from every fourth.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

import tfmq
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.models.denoiser import Inputs
from tfmq.nn.plan import packed_layers
from tfmq.recipes.recipe import Branch, Recipe, Rescaling
from tfmq.targets import open_sampler

STEPS, SEED, CALLS = 20, 1234, 15
GUIDANCE = {"dit": 3.0}
NEITHER: dict[str, Any] = {"branch": Branch(splitters=()), "rescaling": Rescaling()}
CHANGES: dict[str, dict[str, Any]] = {
    "neither": NEITHER,
    "rescaling": {"branch": NEITHER["branch"]},
    "branch": {"rescaling": NEITHER["rescaling"]},
    "both": {},
    "alternating": {"branch": Branch(splitters=("alternating",))},
}


def opened(model: str) -> Any:
    """Return the sampler of a model."""
    return open_sampler(model, options={"guidance_scale": GUIDANCE[model]} if model in GUIDANCE else {})


def recipe_of(model: str, bits: str, change: str, rank: int) -> Recipe:
    """Return the recipe of a row."""
    recipe = tfmq.scheme(f"svd_{bits}")
    calibration = replace(
        recipe.calibration,
        samples=8,
        steps=STEPS,
        interval=4,
        judged=0.0,
        guidance_scale=GUIDANCE.get(model),
    )
    weights = replace(recipe.weights, rank=rank)
    return replace(recipe, calibration=calibration, weights=weights, **CHANGES[change])


def milliseconds(sampler: Any) -> float:
    """Return the median time of a step in OpenVINO at batch 1, at a calibrated timestep."""
    module, example = sampler.denoiser.module, sampler.example().resized(1)
    tfmq.execute(module, "openvino")
    known = module.tfmq_steps.timesteps
    inputs = Inputs(example.sample, known[len(known) // 2].to(example.timestep)[None], example.conditions)
    times = []
    with torch.no_grad():
        for _ in range(CALLS + 3):
            began = time.perf_counter()
            sampler.denoiser(inputs)
            times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times[3:]))


def row(model: str, bits: str, change: str, *, rank: int, images: int, known: dict[str, np.ndarray]) -> str:
    """Quantize and measure; return a row of the table. `known` has the images of full precision, and gets the
    PSNR of these.
    """
    sampler, began = opened(model), time.process_time()
    components = "denoiser" if hasattr(sampler, "pipeline") else None
    tfmq.quantize(sampler, recipe_of(model, bits, change, rank), seed=0, components=components)
    seconds = time.process_time() - began
    layers = packed_layers(sampler.denoiser.module)
    branches = sum(layer.branch is not None for layer in layers.values())
    size = sum(tensor.nbytes for layer in layers.values() for tensor in layer.state_dict().values())
    tfmq.execute(sampler.denoiser.module, "torch")
    drawn = draw(sampler, images, steps=STEPS, seed=SEED)
    psnr = known[change] = np.asarray(paired_fidelity(known["full"], drawn).psnr_db)
    gain = psnr - known.get("rescaling", psnr)
    spread, paired = (values.std(ddof=1) / len(values) ** 0.5 for values in (psnr, gain))
    return (
        f"| {model} | {bits} | {change} | {rank} | {psnr.mean():.2f} ± {spread:.2f} "
        f"| {gain.mean():+.2f} ± {paired:.2f} | {branches} of {len(layers)} | {size} "
        f"| {milliseconds(sampler):.2f} | {seconds:.0f} |"
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
    parser.add_argument("--rows", nargs="+", default=["rescaling", "branch", "both"], choices=CHANGES)
    options = parser.parse_args()
    print(
        "| model | bits | method | rank | PSNR, dB | over rescaling | branches | bytes | ms a step | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for model in options.models:
        with quiet():
            known = {"full": draw(opened(model), options.images, steps=STEPS, seed=SEED)}
            for change in options.rows:
                found = row(
                    model, options.bits, change, rank=options.rank, images=options.images, known=known
                )
                print(found, flush=True)


if __name__ == "__main__":
    main()
