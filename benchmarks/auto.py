"""What `auto` chooses on small models, and how fast that is beside float32: the embedded model, a DiT and a
UNet, W8A8 by rounding to nearest.

    python benchmarks/auto.py

Small models are where integers lose: calling their layers takes longer than computing them. Medians of
interleaved rounds, with whatever else the machine does; the choice is made before and is no part of them.
`$TFMQ_CACHE` on an empty folder shows what the first process sees. The two models have random weights.
"""

import argparse
import copy
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel

import tfmq
from tfmq.backends.auto import CANDIDATES
from tfmq.backends.execution import computed_by
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler, Sampler
from tfmq.nn.swap import steps_of
from tfmq.recipes.recipe import Calibration
from tfmq.targets import open_sampler

WARM, RECIPE = 3, "rtn_w8a8"


def dit() -> Sampler:
    """Return a DiT of 0.4 M parameters."""
    torch.manual_seed(0)
    size = {
        "sample_size": 16,
        "patch_size": 2,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 4,
    }
    module = DiTTransformer2DModel(
        in_channels=4, out_channels=4, num_embeds_ada_norm=10, norm_num_groups=4, **size
    )
    return LoopSampler(
        Denoiser(module.eval()),
        DDIMScheduler(),
        shape=(4, 16, 16),
        conditions={"class_labels": torch.tensor([3])},
    )


def unet() -> Sampler:
    """Return a UNet of 1 M parameters with attention at half of its size."""
    torch.manual_seed(0)
    kinds = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    module = UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64),
        layers_per_block=2,
        norm_num_groups=8,
        attention_head_dim=8,
        **kinds,
    )
    return LoopSampler(Denoiser(module.eval()), DDIMScheduler(), shape=(3, 32, 32))


MODELS: dict[str, Callable[[], Sampler]] = {
    "embedded": lambda: open_sampler("default"),
    "dit": dit,
    "unet": unet,
}


def models(names: list[str]) -> Iterator[tuple[str, Denoiser, Denoiser, Inputs]]:
    """Yield names, full-precision denoisers, their quantized forms, and a call of batch 1 at a calibrated
    timestep.
    """
    for name in names:
        sampler = MODELS[name]()
        original = copy.deepcopy(sampler.denoiser.module)
        recipe = replace(
            tfmq.scheme(RECIPE), calibration=Calibration(samples=1, steps=8, interval=1, batch_size=1)
        )
        tfmq.quantize(sampler, recipe)
        quantized, example = sampler.denoiser, sampler.example()
        timestep = steps_of(quantized.module).timesteps[4:5].to(example.timestep)
        noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
        full = Denoiser(original, sample=quantized.sample, timestep=quantized.timestep)
        yield name, full, quantized, Inputs(noise, timestep, example.conditions)


@torch.no_grad()
def medians(denoisers: dict[str, Denoiser], inputs: Inputs, rounds: int) -> dict[str, float]:
    """Return milliseconds of a call by name; each is called a few times in turn, the first of them
    untimed.
    """
    times: dict[str, list[float]] = {name: [] for name in denoisers}
    for _ in range(rounds):
        for name, denoiser in denoisers.items():
            denoiser(inputs)
            for _ in range(WARM):
                began = time.perf_counter()
                denoiser(inputs)
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        help="a backend that is left out, as where it is not installed",
    )
    parser.add_argument("--only", choices=MODELS, action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    CANDIDATES["cpu"] = tuple(name for name in CANDIDATES["cpu"] if name not in options.without)
    warnings.simplefilter("ignore")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tfmq").setLevel(logging.INFO)
    rows = []
    for name, full, quantized, inputs in models(options.only or list(MODELS)):
        tfmq.execute(quantized.module)
        began = time.perf_counter()
        with torch.no_grad():
            quantized(inputs)
        choosing = time.perf_counter() - began
        found = medians({"float32": full, "auto": quantized}, inputs, options.rounds)
        size = sum(parameter.numel() for parameter in full.module.parameters()) / 1e6
        cells = (
            f"{found['float32']:.1f} | {computed_by(quantized.module)} | "
            f"{found['auto']:.1f} | {found['auto'] / found['float32']:.2f}"
        )
        rows.append(f"| {name} | {size:.1f} M | {cells} | {choosing:.1f} |")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(
        (
            "| model | parameters | float32 ms | auto chose | ms | ratio "
            "| first call s |\n|---|---|---|---|---|---|---|"
        ),
        *rows,
        sep="\n",
    )


if __name__ == "__main__":
    main()
