"""What grids and groups of weights are worth: images of models quantized by several schemes, beside full
precision's from the same noise, and bytes of the tensors.

    python benchmarks/weight_grids.py dit --schemes transformer_w4a8,group_w4a8,fp4_w4a8
    python benchmarks/weight_grids.py default --schemes w4a8,group_w4a8,fp4_w4a8
    python benchmarks/weight_grids.py dit --weights

Prints a row for each scheme: PSNR to full precision of images from noise that calibration has not seen (mean,
standard error and median), the error of the output of layers with measured grids in dB below the output,
bytes, which grids layers have, and seconds of the job on a few images, units learning from every fourth step.
With `--weights` nothing is drawn: the rows are the errors of nearest codes of 4 bits in the weights of linear
layers, mean and worst of the layers in dB, for groups with multiples of a row's scale, and with steps of any
size (`free`). The last row is of all layers: what they win where rows trade bits, one each at most, so that
the layer keeps its bytes (OMQ of MPQ-DM, Feng et al., 2025), and how many rows do.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import log10

import numpy as np
from short import opened, quantize, with_error
from torch import nn

import tfmq
from tfmq.evaluation.paired import paired_fidelity
from tfmq.evaluation.sampling import draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import GRIDS, Grid, IntegerFormat, Table
from tfmq.numerics.groups import group_size
from tfmq.quantizers.weight import fit_grid
from tfmq.reconstruction.solvers import SOLVERS

STEPS, SEED = 20, 1234
GUIDANCE = {"text": 3.0, "dit": 2.0}


def row(model: str, scheme: str, full: np.ndarray, *, samples: int, solver: str | None) -> str:
    """Quantize and measure; return a row of the table."""
    recipe = tfmq.scheme(scheme)
    calibration = replace(recipe.calibration, samples=samples, steps=STEPS, interval=4, judged=0.0)
    sampler, began = opened(model, GUIDANCE), time.perf_counter()
    recipe = replace(recipe, calibration=calibration)
    if solver is not None:
        recipe = replace(recipe, rounding=replace(recipe.rounding, solver=solver))
    report = quantize(sampler, recipe)
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
    named = ", ".join(f"{name}: {count}" for name, count in sorted(grids.items()))
    return (
        f"| {model} | `{scheme}` | {with_error(psnr)} | {np.median(psnr):.2f} | {errors} "
        f"| {report['bytes']['quantized'] / 1e6:.3f} | {named} | {seconds:.0f} |"
    )


def weight_errors(model: str) -> Iterator[str]:
    """Yield a row for each kind of grid."""
    module = opened(model, GUIDANCE).denoiser.module
    found = [layer.weight.detach() for layer in module.modules() if isinstance(layer, nn.Linear)]
    weights = [weight for weight in found if weight.shape[1] >= 128]
    tables = {name: Table(name, GRIDS[name]) for name in ("e2m1", "e3m0", "balanced9")}
    shapes: dict[str, tuple[Grid, int, bool]] = {"row": (IntegerFormat(4), 0, False)}
    for size in (128, 64, 32):
        shapes[f"group {size}"] = (IntegerFormat(4), size, False)
        shapes[f"free {size}"] = (IntegerFormat(4), size, True)
    shapes |= {name: (grid, 0, False) for name, grid in tables.items()}
    shapes["e2m1, group 32"] = (tables["e2m1"], 32, False)
    for name, (fmt, size, free) in shapes.items():
        errors = []
        for weight in weights:
            cut = group_size(weight.shape[1:], size) if free else 0
            part = weight.reshape(-1, cut) if cut else weight
            grid = fit_grid(part, fmt, group=0 if free else size)
            errors.append(sqnr_db(part, grid.decode(grid.encode(part))))
        yield f"| {model} | {name} | {np.mean(errors):.2f} | {min(errors):.2f} | {len(errors)} |"
    yield traded(model, module)


def traded(model: str, module: nn.Module) -> str:
    """Return the row of weights whose rows of little error give a bit to rows of much, the largest gain to
    the least cost, as long as it is larger: exact, where the kurtosis of a row is a guess.
    """
    weights = [
        layer.weight.detach() for layer in module.modules() if isinstance(layer, (nn.Linear, nn.Conv2d))
    ]
    gains, moved = [], 0
    for weight in weights:
        fewer, own, more = (
            (grid.decode(grid.encode(weight)) - weight).flatten(1).square().sum(dim=1)
            for grid in (fit_grid(weight, IntegerFormat(bits)) for bits in (3, 4, 5))
        )
        gain, cost = (own - more).sort(descending=True).values, (fewer - own).sort().values
        won = (gain - cost).clamp(min=0)
        gains.append(10 * log10(float(own.sum() / (own.sum() - won.sum()))))
        moved += 2 * int((won > 0).sum())
    rows = sum(map(len, weights))
    return (
        f"| {model} | rows of 3, 4, 5 bits, won by {moved / rows:.0%}; median {np.median(gains):.2f} "
        f"| {np.mean(gains):.2f} | {min(gains):.2f} | {len(gains)} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--schemes", default="transformer_w4a8,group_w4a8,fp4_w4a8")
    parser.add_argument("--weights", action="store_true", help="errors of weights alone")
    parser.add_argument("--solver", choices=SOLVERS, help="of the units, instead of the scheme's")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    if options.weights:
        print("| model | grid | mean, dB | worst | layers |\n|---|---|---|---|---|")
        with quiet():
            for model in options.models:
                for line in weight_errors(model):
                    print(line, flush=True)
        return
    print("| model | scheme | PSNR, dB | median | layers, dB | MB | grids | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for model in options.models:
        with quiet():
            full = draw(opened(model, GUIDANCE), options.images, steps=STEPS, seed=SEED)
            for scheme in options.schemes.split(","):
                print(row(model, scheme, full, samples=options.samples, solver=options.solver), flush=True)


if __name__ == "__main__":
    main()
