"""What quantizing while loading costs in images, beside what it takes: nothing is calibrated.

    python benchmarks/at_load.py

Images of `text` (20 steps, guidance 3) from the same noise with the UNet loaded in full precision and at each
number of bits; PSNR in dB, and seconds from `from_pretrained` to a pipeline.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from short import with_error

import tfmq
from tfmq.evaluation.paired import psnr
from tfmq.integrations.diffusers.at_load import BITS
from tfmq.targets import named_directory

PROMPTS = Path(__file__).parent / "prompts" / "scenes.txt"


def opened(bits: str | None) -> tuple[Any, float]:
    """Return the pipeline with a UNet of these bits, and the seconds that loading took."""
    began = time.perf_counter()
    mapping = {"unet": tfmq.TFMQConfig(bits=bits, backend="simulated")}
    config = {"quantization_config": PipelineQuantizationConfig(quant_mapping=mapping)} if bits else {}
    pipeline = DiffusionPipeline.from_pretrained(named_directory("text"), torch_dtype=torch.float32, **config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, time.perf_counter() - began


def images(pipeline: Any, count: int, seed: int) -> np.ndarray:
    """Return images of the first prompts, uint8 `[N, H, W, 3]`."""
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()[:count]
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    noise = torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))
    drawn = pipeline(prompts, latents=noise, num_inference_steps=20, guidance_scale=3.0).images
    return np.stack([np.asarray(image) for image in drawn])


def main() -> None:
    """Print a line for each number of bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=4711)
    options = parser.parse_args()
    exact = images(opened(None)[0], options.images, options.seed)
    for bits in BITS:
        pipeline, seconds = opened(bits)
        found = psnr(exact, images(pipeline, options.images, options.seed))
        print(f"{bits}: {with_error(found)} dB, median {np.median(found):.2f}, loaded in {seconds:.1f} s")


if __name__ == "__main__":
    main()
