"""How long a step takes at timesteps that were not calibrated, beside calibrated ones: the ratio of
interleaved medians, by backend.

    tfmq quantize default --scheme w8a8 --output-dir runs/w8a8
    python benchmarks/unseen_timesteps.py runs/w8a8 --backends openvino,torch-compile

`known` are calibrated timesteps; `first` are others at their first call, which their temporal features have
to be computed for; `again` are others at later calls, as every picture after the first one makes them. Rounds
take turns, and each call of a round is at another timestep. Prints one JSON object.
"""

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import torch

import tfmq
from tfmq.backends.backend import Options
from tfmq.models.denoiser import Inputs
from tfmq.targets import open_sampler

WARM = 3
# Timesteps of `again`, as many as a schedule of few steps has.
FEW = 20


def timesteps(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the calibrated timesteps, others of which none comes twice, and a few others."""
    known = module.tfmq_steps.timesteps.long()
    others = torch.arange(int(known.min()), int(known.max()))
    others = others[~torch.isin(others, known)]
    few = others[:: max(1, len(others) // FEW)]
    return {"known": known, "first": others[~torch.isin(others, few)], "again": few}


@torch.no_grad()
def medians(
    run: Callable[[torch.Tensor], object], at: dict[str, torch.Tensor], rounds: int
) -> dict[str, float]:
    """Return the median milliseconds of a call by kind of timestep."""
    spent: dict[str, list[float]] = {kind: [] for kind in at}
    for timestep in at["again"]:
        run(timestep)
    for number in range(WARM + rounds):
        for kind, values in at.items():
            timestep = values[number % len(values)]
            began = time.perf_counter()
            run(timestep)
            if number >= WARM:
                spent[kind].append(1e3 * (time.perf_counter() - began))
    return {kind: statistics.median(values) for kind, values in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", help="what tfmq quantize wrote")
    parser.add_argument(
        "--backends",
        default="openvino,torch-compile",
        help="separated by commas; -compile for torch's compiler",
    )
    parser.add_argument("--batch", default="1", help="sizes, separated by commas")
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", message=".*was not calibrated")
    sampler = open_sampler(options.directory)
    denoiser, found = sampler.denoiser, {}
    at = timesteps(denoiser.module)
    for backend in options.backends.split(","):
        tfmq.execute(
            denoiser.module,
            backend.removesuffix("-compile"),
            options=Options(compile=backend.endswith("-compile")),
        )
        for batch in map(int, options.batch.split(",")):
            example = sampler.example().resized(batch)
            noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))

            def run(
                timestep: torch.Tensor, noise: torch.Tensor = noise, example: Inputs = example
            ) -> torch.Tensor:
                return denoiser(Inputs(noise, timestep.expand(len(noise)), example.conditions))

            ms = medians(run, at, options.rounds)
            ratios = {f"{kind} / known": ms[kind] / ms["known"] for kind in ("first", "again")}
            found[f"{backend}, batch {batch}"] = ms | ratios
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__, "ms": found}, indent=1))


if __name__ == "__main__":
    main()
