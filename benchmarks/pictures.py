"""Draw the picture of the README: prompts, and below each the images of full precision and of quantized
models from the same noise.

    tfmq quantize text --scheme w8a8 --steps 20 --output-dir runs/text-w8a8
    tfmq quantize text --scheme w4a8 --steps 20 --output-dir runs/text-w4a8
    python benchmarks/pictures.py text runs/text-w8a8 runs/text-w4a8 --output docs/figures/text.png

The prompts are the first of `benchmarks/prompts/scenes.txt`, which neither training nor calibration has seen;
the noise is new as well. Sizes are those of all tensors of the pipeline.
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import nn

from tfmq.artifact import holds_quantized, stored_manifest
from tfmq.evaluation.sampling import Images, draw_batch
from tfmq.integrations.diffusers.quiet import quiet
from tfmq.report.pictures import enlarged, montage
from tfmq.report.summary import megabytes
from tfmq.targets import open_sampler

PROMPTS = Path(__file__).parent / "prompts" / "scenes.txt"
# Pixels: the side of a tile, between tiles, for labels at the left and prompts above, and of a border.
TILE, GAP, LEFT, TOP, BORDER, DPI = 128, 6, 130, 92, 12, 100
# Letters of a prompt in a line above a tile.
LETTERS = 19


def rows(
    models: list[str], prompts: tuple[str, ...], *, steps: int, seed: int, guidance: float
) -> list[tuple[str, Images]]:
    """Return the images of each model, and what is written beside them."""
    found = []
    for model in models:
        with quiet():
            sampler: Any = open_sampler(model, prompts=prompts, options={"guidance_scale": guidance})
        quantized = holds_quantized(Path(model))
        name = stored_manifest(Path(model)).provenance.scheme if quantized else "full precision"
        parts = [part for part in sampler.pipeline.components.values() if isinstance(part, nn.Module)]
        size = (
            sum(path.stat().st_size for path in Path(model).rglob("*.safetensors"))
            if quantized
            else sum(4 * value.numel() for part in parts for value in part.parameters())
        )
        label = f"{str(name).removeprefix('tfmq_').upper() if quantized else name}\n{megabytes(size)}"
        found.append((label, draw_batch(sampler, range(len(prompts)), steps=steps, seed=seed)))
    return found


def write(path: Path, drawn: list[tuple[str, Images]], prompts: tuple[str, ...]) -> None:
    """Write the picture."""
    canvas = montage(
        enlarged(np.concatenate([images for _, images in drawn]), width=TILE), columns=len(prompts), gap=GAP
    )
    height, width = canvas.shape[:2]
    total_width, total_height = LEFT + width + BORDER, TOP + height + BORDER
    figure = Figure(figsize=(total_width / DPI, total_height / DPI), dpi=DPI, facecolor="white")
    axes = figure.add_axes(
        (LEFT / total_width, BORDER / total_height, width / total_width, height / total_height)
    )
    axes.imshow(canvas, interpolation="nearest", aspect="equal")
    axes.set_axis_off()
    for number, (label, _) in enumerate(drawn):
        axes.text(
            -12,
            number * (TILE + GAP) + TILE / 2,
            label,
            ha="right",
            va="center",
            fontsize=11,
            color="#333333",
        )
    for number, prompt in enumerate(prompts):
        text = "\n".join(textwrap.wrap(prompt, LETTERS))
        axes.text(
            number * (TILE + GAP) + TILE / 2, -10, text, ha="center", va="bottom", fontsize=9, color="#333333"
        )
    figure.savefig(path, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="full precision first, then what tfmq quantize wrote")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    prompts = tuple(PROMPTS.read_text(encoding="utf-8").splitlines()[: options.num_images])
    drawn = rows(options.models, prompts, steps=options.steps, seed=options.seed, guidance=options.guidance)
    write(options.output, drawn, prompts)


if __name__ == "__main__":
    main()
