"""What ranges of single timesteps cost where few values are seen, and what pooling neighbours gives back.

    python benchmarks/few_values.py

A small network learns to draw points on a ring, and is quantized from 1, 4 or 16 points, each of which gives
a layer 2 values or 128. 512 points are then drawn from noise that calibration has not seen, in full precision
and by the quantized network. Printed is the PSNR of the points (peak 1) over three seeds of the calibration,
where the range of a timestep rests on its own values (0), and on those of its neighbours too until there are
2048 or 8192. Takes about three minutes on one core.
"""

import argparse
import copy
import math
from dataclasses import replace
from unittest.mock import patch

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tfmq
from tfmq.recipes.recipe import Recipe

POINTS, STEPS, SEEDS = 512, 50, (0, 1, 2)


class Ring(nn.Module):
    """Predicts the noise in points of the plane."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.entry, self.exit = nn.Linear(2, width), nn.Linear(width, 2)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.embed, self.shift = nn.Linear(32, width), nn.Linear(width, width)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        angle = torch.as_tensor(timestep).float().reshape(-1, 1) * torch.exp(torch.arange(16) * -0.5)
        embedded = nn.functional.silu(self.embed(torch.cat([angle.sin(), angle.cos()], dim=1)))
        shift = self.shift(embedded)
        hidden = nn.functional.silu(self.entry(sample) + shift)
        hidden = nn.functional.silu(self.first(hidden) + shift)
        return self.exit(nn.functional.silu(self.second(hidden) + shift))


def trained() -> Ring:
    """Return a network that has learned the ring."""
    torch.manual_seed(0)
    network, scheduler = Ring(), DDIMScheduler()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    for _ in range(3000):
        angle, radius = torch.rand(POINTS) * 2 * math.pi, 0.7 + 0.02 * torch.randn(POINTS)
        points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
        noise, timestep = torch.randn(POINTS, 2), torch.randint(0, 1000, (POINTS,))
        loss = (network(scheduler.add_noise(points, noise, timestep), timestep) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.requires_grad_(False).eval()


def sampler(network: Ring) -> tfmq.LoopSampler:
    """Return a sampler of a copy of the network."""
    return tfmq.LoopSampler(tfmq.Denoiser(copy.deepcopy(network)), DDIMScheduler(), shape=(2,))


def drawn(made: tfmq.LoopSampler) -> Tensor:
    """Return points from noise that no calibration has."""
    return made.run(range(POINTS), steps=STEPS, seed=99)


def psnr_db(network: Ring, full: Tensor, recipe: Recipe, seed: int, fewest: int) -> float:
    """Return the mean PSNR of the points of the network that `recipe` makes."""
    made = sampler(network)
    with patch("tfmq.jobs.calibration.FEWEST_VALUES", fewest):
        tfmq.quantize(made, recipe, seed=seed)
    error = (drawn(made) - full).double().square().mean(dim=1)
    return float((-10 * error.clamp(min=1e-12).log10()).mean())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scheme", default="w8a8")
    base = tfmq.scheme(parser.parse_args().scheme)
    network = trained()
    full = drawn(sampler(network))
    print(f"tfmq {tfmq.__version__}, torch {torch.__version__}, {base.name}, {STEPS} steps")
    for samples in (1, 4, 16):
        calibration = replace(base.calibration, samples=samples, steps=STEPS, judged=0.0)
        recipe = replace(base, calibration=calibration)
        for fewest in (0, 2048, 8192):
            found = [psnr_db(network, full, recipe, seed, fewest) for seed in SEEDS]
            figures = ", ".join(f"{value:.1f}" for value in found)
            print(
                f"{samples:2} points, {fewest:4} values: {sum(found) / len(found):.1f} dB ({figures})",
                flush=True,
            )


if __name__ == "__main__":
    main()
