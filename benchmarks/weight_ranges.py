"""What a search for the scales of 8-bit weights wins beside exact ranges, and what it takes.

    python benchmarks/weight_ranges.py default text dit

SQNR in dB of the weights of a denoiser that have two axes or more, on a scale a row, and seconds.
"""

import argparse
import time

import torch

from tfmq.numerics.errors import sqnr_db
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.weight import fit_grid
from tfmq.targets import open_sampler

METHODS = ("search", "min_max")


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="names or directories of pipelines")
    parser.add_argument("--bits", type=int, default=8)
    options = parser.parse_args()
    fmt = IntegerFormat(options.bits, symmetric=options.bits == 8)
    for model in options.models:
        module = open_sampler(model).denoiser.module
        weights = [weight.detach().float() for weight in module.parameters() if weight.ndim > 1]
        found = []
        for method in METHODS:
            began = time.perf_counter()
            grids = [fit_grid(weight, fmt, method=method) for weight in weights]
            spent = time.perf_counter() - began
            decoded = [grid.decode(grid.encode(w)).flatten() for grid, w in zip(grids, weights, strict=True)]
            error = sqnr_db(torch.cat([w.flatten() for w in weights]), torch.cat(decoded))
            found.append(f"{method} {error:.2f} dB in {spent:.2f} s")
        count = sum(weight.numel() for weight in weights) / 1e6
        print(f"{model}, {count:.1f} million weights: {', '.join(found)}", flush=True)


if __name__ == "__main__":
    main()
