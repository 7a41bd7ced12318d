"""Write the prompts that scenes are evaluated with, and others to calibrate on.

    python training/prompts.py --output-dir benchmarks/prompts

`scenes.txt` has 500 captions of combinations that training keeps out, `calibration.txt` 128 of combinations
that it sees. Both files are committed, so that evaluating needs no data; a test holds them to this script.
With `--model DIR` a pipeline brings the latter as its own, and `--guidance`: it is drawn and calibrated so.
"""

import argparse
from pathlib import Path

import torch
from scenes import draw_scene, held_out, said
from torch import Generator

from tfmq.storage.atomic import write_json
from tfmq.storage.prompts import GUIDANCE, PROMPTS_FILE, prompts_content

# File, number of captions, held out of training or not, seed.
FILES = (("scenes.txt", 500, True, 18), ("calibration.txt", 128, False, 19))


def captions(count: int, *, held: bool, seed: int) -> list[str]:
    """Return `count` different captions of scenes that are kept out of training (`held`) or not."""
    generator = Generator().manual_seed(seed)
    # A dictionary keeps the order and drops what comes twice.
    found: dict[str, None] = {}
    while len(found) < count:
        first, second = torch.randint(10, (2,), generator=generator).tolist()
        scene = draw_scene((first, second), generator)
        if held_out(scene) == held:
            found[said(scene, generator).caption()] = None
    return list(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="directory of a pipeline to give prompts to")
    parser.add_argument("--guidance", type=float, help="guidance scale that the pipeline is meant for")
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, count, held, seed in FILES:
        (options.output_dir / name).write_text(
            "\n".join(captions(count, held=held, seed=seed)) + "\n", encoding="utf-8"
        )
    if options.model is not None:
        _, count, held, seed = FILES[1]
        write_json(
            options.model / PROMPTS_FILE,
            prompts_content(captions(count, held=held, seed=seed), {GUIDANCE: options.guidance}),
        )


if __name__ == "__main__":
    main()
