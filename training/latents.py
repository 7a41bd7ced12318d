"""Paint a pool of scenes and encode it once, so that the denoisers train on latents alone.

    python training/latents.py --digits DIR --autoencoder runs/autoencoder/vae --output-dir runs/latents

The pool holds the latents' means, scaled to a unit deviation, and every scene's attributes as its caption.
`train` has digits of the split `PAINTED`, `held_out` digits and combinations that training does not see.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from scenes import JUDGED, PAINTED, read_digits, scene_batch, typical
from torch import Generator, Tensor

from tfmq.evaluation.adherence.scenes import Scene, parse

PARTS = {"train": (PAINTED, False), "held_out": (JUDGED, True)}
CHUNK = 256


def read_pool(directory: Path, part: str) -> tuple[Tensor, list[Scene]]:
    """Return the latents `[N, 4, 16, 16]` in float32 and the scenes of one part of a pool."""
    latents = load_file(directory / f"{part}.safetensors")["latents"].float()
    return latents, [
        parse(caption) for caption in json.loads((directory / f"{part}.json").read_text(encoding="utf-8"))
    ]


@torch.no_grad()
def encode(model: AutoencoderKL, images: Tensor) -> Tensor:
    """Return scaled latents of images `[N, 3, 64, 64]` in [0, 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        pixels = (images * 2 - 1).to(memory_format=torch.channels_last)
        return model.encode(pixels).latent_dist.mode().float().contiguous() * model.config.scaling_factor


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument(
        "--exemplars",
        type=int,
        default=50,
        help="of each digit: the most typical ones, which a small model can learn to tell apart",
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=0.25,
        help="how much varies that captions do not say, relative to the most the judge knows",
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    digits, labels = read_digits(options.digits)
    model = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32).to(
        memory_format=torch.channels_last
    )
    for part, (split, held) in PARTS.items():
        count = options.scenes if part == "train" else min(2048, options.scenes)
        kept = torch.arange(len(digits))[split]
        kept = kept[typical(digits[kept], labels[kept], options.exemplars)]
        latents, captions, began = [], [], time.time()
        for start in range(0, count, CHUNK):
            # A generator for each chunk: a pool of any size begins with the same scenes.
            generator = Generator().manual_seed(options.seed * 1_000_003 + start)
            scenes, images = scene_batch(
                digits[kept],
                labels[kept],
                min(CHUNK, count - start),
                generator,
                held=held,
                jitter=options.jitter,
            )
            latents.append(encode(model, images).half())
            captions += [scene.caption() for scene in scenes]
            if start % (CHUNK * 16) == 0:
                print(f"{part}: {len(captions)} of {count} scenes, {time.time() - began:.0f} s", flush=True)
        partial = options.output_dir / f"{part}.partial"
        save_file({"latents": torch.cat(latents).contiguous()}, partial)
        (options.output_dir / f"{part}.json").write_text(json.dumps(captions), encoding="utf-8")
        os.replace(partial, options.output_dir / f"{part}.safetensors")


if __name__ == "__main__":
    main()
