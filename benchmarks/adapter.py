"""What a LoRA does beside integers: an attribute that a model has not seen, asked of full precision and of
quantized models.

    python training/lora.py --digits DIGITS --output-dir runs/lora
    python benchmarks/adapter.py --adapter runs/lora w8a8=RUNS/W8A8 w4a8=RUNS/W4A8

Every model draws the same prompts from the same noise, with the adapter and without: the share of images
whose figure has the colours of the new ink, and of those that show the digit, with the 95 % intervals of
Wilson. With the adapter taken off, each model draws some images once more; they have to be the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from leaderboard_page import share_in_words
from torch import Tensor

from tfmq.evaluation.adherence.figures import INK, find_blobs, ground, nearest_colour
from tfmq.evaluation.adherence.scene_judge import SceneJudge
from tfmq.evaluation.adherence.scenes import COLOURS, DIGITS
from tfmq.evaluation.adherence.shares import Share
from tfmq.evaluation.cost.system import describe_machine, machine_in_words
from tfmq.evaluation.sampling import Images, draw
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.targets import named_directory, open_sampler

# Noise that neither calibration nor training has seen.
SEED = 1234
GUIDANCE = 3.0


class Asked:
    """The prompts for an ink whose upper and lower `halves` have a colour each, and what shows it."""

    def __init__(self, ink: str, halves: list[str], count: int) -> None:
        self.ink, self.halves = ink, halves
        grounds = [name for name in COLOURS if name not in halves]
        pairs = [(index % len(DIGITS), grounds[index % len(grounds)]) for index in range(count)]
        self.digits = [digit for digit, _ in pairs]
        self.prompts = tuple(f"a {ink} {DIGITS[digit]} on a {ground} ground" for digit, ground in pairs)
        self.judge = SceneJudge()

    def shares(self, images: Images) -> dict[str, Share]:
        """Return how many of the images `[N, H, W, 3]` show ink and digit as asked."""
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
        inks = [halves_of(image) == self.halves for image in pixels]
        digits = [
            self.judge.digits(find_blobs(image, 1)[1]) == [digit]
            for image, digit in zip(pixels, self.digits, strict=True)
        ]
        return {"ink": Share(sum(inks), len(inks)), "digit": Share(sum(digits), len(digits))}


def halves_of(image: Tensor) -> list[str]:
    """Return the colours of the upper and the lower half of the figure in an image `[3, H, W]` in [0, 1];
    nothing where one half is not there.
    """
    difference = (image - ground(image)).norm(dim=0)
    rows = (difference > INK).any(1).nonzero().flatten()
    if not len(rows):
        return []
    middle, found = int(rows.float().mean().round()), []
    for half in (slice(0, middle), slice(middle, None)):
        part = difference[half]
        if not bool((part > INK).any()):
            return []
        core = part >= part[part > INK].quantile(0.5)
        found.append(nearest_colour(image[:, half][:, core].mean(1)))
    return found


def measure(target: Path, adapter: Path, asked: Asked, options: argparse.Namespace) -> list[str]:
    """Return the cells of one model: ink without the adapter, ink and digit with it, and what taking it off
    leaves.
    """
    with quiet():
        sampler: Any = open_sampler(target, prompts=asked.prompts, options={"guidance_scale": GUIDANCE})

    def drawn(count: int) -> Images:
        with torch.no_grad():
            return draw(sampler, count, steps=options.steps, seed=SEED, batch_size=options.batch_size)

    without = drawn(options.num_images)
    sampler.pipeline.load_lora_weights(str(adapter))
    beside = drawn(options.num_images)
    sampler.pipeline.unload_lora_weights()
    same = np.array_equal(drawn(options.batch_size), without[: options.batch_size])
    shown = asked.shares(beside)
    cells = [asked.shares(without)["ink"], shown["ink"], shown["digit"]]
    return [*map(share_in_words, cells), "the same bytes" if same else "OTHER"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="NAME=DIR", help="quantized pipelines of `text`")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=160)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=40)
    options = parser.parse_args()
    described = json.loads((options.adapter / "ink.json").read_text(encoding="utf-8"))
    asked = Asked(described["ink"], described["halves"], options.num_images)
    models: dict[str, Any] = {"full precision": named_directory("text")}
    models |= {name: Path(place) for name, _, place in (text.partition("=") for text in options.models)}
    print(machine_in_words(describe_machine(torch.get_num_threads())))
    print(f"{options.num_images} images of {options.steps} steps, ink {asked.ink}")
    print("| model | ink without, % | ink with it, % | digit with it, % | taken off |")
    print("|---" * 5 + "|")
    for name, target in models.items():
        print(f"| {name} | {' | '.join(measure(target, options.adapter, asked, options))} |", flush=True)


if __name__ == "__main__":
    main()
