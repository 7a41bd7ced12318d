"""What quantizing while loading costs in images, beside what it takes: nothing is calibrated.

    python benchmarks/at_load.py
    python benchmarks/at_load.py --full-size

Images of `text` (20 steps, guidance 3) from the same noise with the UNet loaded in full precision and at each
number of bits; PSNR in dB, and seconds from `from_pretrained` to a pipeline. With `--full-size` the UNet of
Stable Diffusion 1.5's size instead, 860 M random parameters in half precision and shards of 500 MB, each way
in a process of its own: seconds, and memory beyond what the process held before, at most and afterwards.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig
from short import with_error

import tfmq
from tfmq.evaluation.cost.system import describe_machine, machine_in_words, peak_bytes, resident_bytes
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


def load(directory: Path, bits: str) -> None:
    """Print as JSON the seconds and bytes of loading a UNet at these bits, or in float16 or float32."""
    from diffusers import UNet2DConditionModel

    # What the first model of a process costs is not this model's.
    UNet2DConditionModel(block_out_channels=(32, 32, 32, 32), layers_per_block=1)
    before, began = resident_bytes(), time.perf_counter()
    stock = bits.startswith("float")
    dtype = getattr(torch, bits) if stock else torch.float16
    # What computes is chosen at the first call: until then there are the codes alone.
    config = {} if stock else {"quantization_config": tfmq.TFMQConfig(bits=bits)}
    model = UNet2DConditionModel.from_pretrained(directory, torch_dtype=dtype, **config)
    seconds = time.perf_counter() - began
    assert model.config is not None
    print(json.dumps([seconds, peak_bytes() - before, resident_bytes() - before]))


def full_size(rounds: int) -> None:
    """Print a table of loading a UNet of 860 M parameters; medians over rounds, ways in turns."""
    from diffusers import UNet2DConditionModel

    ways: dict[str, list[list[float]]] = {bits: [] for bits in ("float16", "float32", *BITS)}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).half()
        model.save_pretrained(folder, max_shard_size="500MB")
        del model
        for _ in range(rounds):
            for bits, found in ways.items():
                command = [sys.executable, __file__, "--load", folder, "--bits", bits]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout.splitlines()[-1]))
    print(machine_in_words(describe_machine(torch.get_num_threads())))
    print("| | seconds | peak (GB) | held (GB) |\n|---|---|---|---|")
    for bits, found in ways.items():
        seconds, peak, held = np.median(np.array(found), axis=0)
        print(f"| {bits} | {seconds:.1f} | {peak / 1e9:.2f} | {held / 1e9:.2f} |")


def main() -> None:
    """Print a line for each number of bits."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--full-size", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bits", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        load(options.load, options.bits)
        return
    if options.full_size:
        full_size(options.rounds)
        return
    exact = images(opened(None)[0], options.images, options.seed)
    for bits in BITS:
        pipeline, seconds = opened(bits)
        found = psnr(exact, images(pipeline, options.images, options.seed))
        print(f"{bits}: {with_error(found)} dB, median {np.median(found):.2f}, loaded in {seconds:.1f} s")


if __name__ == "__main__":
    main()
