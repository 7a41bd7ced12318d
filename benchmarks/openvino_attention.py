"""How long attention takes in OpenVINO, by the zero-points of its operands.

    python benchmarks/openvino_attention.py --rounds 7 --threads 2

A denoiser that is one attention, quantized to eight bits: `per_step` has a zero-point for each timestep,
`products` one that OpenVINO multiplies in integers, `float` no grids in attention. All take turns; medians.
"""

import argparse
import statistics
from dataclasses import replace

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tfmq
from tfmq.backends.backend import Options
from tfmq.backends.execution import execute
from tfmq.evaluation.cost.system import describe_machine, machine_in_words
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.stopwatch import timed

# Heads, queries and keys, channels of a head: Stable Diffusion 1.5 at 512 pixels, XL at 1024.
SHAPES = ((8, 4096, 40), (10, 4096, 64))
FORMS = {
    "float": {"products": False},
    "per_step": {"zero_points": "per_step"},
    "products": {"zero_points": "products"},
}


class Attending(nn.Module):
    """Lets the places of a sample `[B, heads, places, channels]` attend to each other."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the attention of linear maps of the sample."""
        return F.scaled_dot_product_attention(self.query(sample), self.key(sample), self.value(sample))


def quantized(shape: tuple[int, int, int], form: str, threads: int) -> tuple[nn.Module, Inputs]:
    """Return the denoiser as OpenVINO executes it, and a call at a calibrated timestep."""
    torch.manual_seed(0)
    sampler = LoopSampler(Denoiser(Attending(shape[2])), DDIMScheduler(), shape=shape)
    sampler.to_images = nn.Identity()
    recipe = tfmq.scheme("quick_w8a8")
    tfmq.quantize(
        sampler,
        replace(
            recipe,
            activations=replace(recipe.activations, **FORMS[form]),
            calibration=replace(recipe.calibration, samples=1, steps=1, interval=1),
        ),
    )
    module = sampler.denoiser.module
    execute(module, "openvino", options=Options(threads=threads))
    return module, replace(sampler.example(), timestep=module.tfmq_steps.timesteps.long())


@torch.no_grad()
def main() -> None:
    """Print a row for each shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    print(machine_in_words(describe_machine(options.threads)))
    print(f"| heads | queries | channels | {' | '.join(f'{form} ms' for form in FORMS)} |")
    print("|---" * (3 + len(FORMS)) + "|")
    for shape in SHAPES:
        models = {form: quantized(shape, form, options.threads) for form in FORMS}
        times: dict[str, list[float]] = {form: [] for form in FORMS}
        for number in range(options.rounds + 1):
            for form, (module, inputs) in models.items():
                seconds = timed(lambda module=module, inputs=inputs: Denoiser(module)(inputs))[1]
                # The first call compiles.
                if number:
                    times[form].append(seconds)
        row = (f"{1000 * statistics.median(taken):.0f}" for taken in times.values())
        print(f"| {' | '.join(map(str, shape))} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
