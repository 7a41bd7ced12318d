"""Train `dit`: a class-conditional diffusion transformer on the same latents, in a stock `DiTPipeline`.

    python training/dit.py --latents runs/latents --autoencoder runs/autoencoder/vae --output-dir runs/dit

A class is a digit in an ink; the ground is free. The table of classes has diffusers' thousand rows and one
for none, as `DiTPipeline` has the number of the row for none fixed; the rows beyond the eighty classes are
never used. adaLN-Zero blocks (Peebles and Xie, 2023).
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import build_scheduler, draw_timesteps, noised, picture
from latents import read_pool
from loop import Run, Schedule
from torch import Generator, Tensor

from tfmq.evaluation.adherence.scenes import COLOURS, DIGITS, Figure, Scene

INKS = tuple(COLOURS)
SHOWN = (3, 18, 27, 33, 44, 54, 56, 71)
GUIDANCE = 2.0


def build(width: float = 1.0) -> DiTTransformer2DModel:
    """Six blocks on patches of 2x2 latents."""
    return DiTTransformer2DModel(
        num_attention_heads=round(5 * width),
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        sample_size=16,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )


def class_of(figure: Figure) -> int:
    """Return the class of a digit in an ink."""
    return figure.digit * len(INKS) + INKS.index(figure.ink or "")


def class_names() -> dict[int, str]:
    """Return the name of every class: a caption, such as "a red seven"."""
    figures = [Figure(digit=digit, ink=ink) for digit in range(len(DIGITS)) for ink in INKS]
    return {class_of(figure): Scene(figures=(figure,)).caption() for figure in figures}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--autoencoder", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument(
        "--width", type=float, default=1.0, help="channels, relative to the model that the project has"
    )
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    pools = {}
    for held, part in ((False, "train"), (True, "held_out")):
        latents, scenes = read_pool(options.latents, part)
        alone = [index for index, scene in enumerate(scenes) if len(scene.figures) == 1]
        pools[held] = latents[alone], torch.tensor([class_of(scenes[index].figures[0]) for index in alone])
    torch.manual_seed(options.seed)
    module = build(options.width)
    schedule = Schedule(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        average=0.999,
        seed=options.seed,
    )
    run = Run(options.output_dir, module, schedule)
    for block in module.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())
    denoise = torch.compile(module) if options.compile else module

    def loss(generator: Generator, held: bool) -> Tensor:
        latents, classes = pools[held]
        index = torch.randint(len(latents), (options.batch_size,), generator=generator)
        batch = noised(latents[index], draw_timesteps(options.batch_size, generator), generator)
        predicted = denoise(
            batch.noisy, timestep=batch.timesteps, class_labels=classes[index], return_dict=False
        )[0]
        return (predicted.float() - batch.velocity).square().mean()

    def export(run: Run) -> None:
        average = build(options.width)
        run.load_average(average)
        vae = AutoencoderKL.from_pretrained(options.autoencoder, torch_dtype=torch.float32)
        pipeline = DiTPipeline(
            transformer=average.eval(), vae=vae, scheduler=build_scheduler(), id2label=class_names()
        )
        # As the published DiT pipelines do: names of classes are read back from here.
        pipeline.register_to_config(id2label=class_names())
        pipeline.set_progress_bar_config(disable=True)
        rows = []
        for seed in range(2):
            generators = [Generator().manual_seed(seed * 100 + index) for index in range(len(SHOWN))]
            images = pipeline(
                list(SHOWN),
                generator=generators,
                num_inference_steps=25,
                guidance_scale=GUIDANCE,
                output_type="np",
            ).images
            rows.append(torch.from_numpy(images).permute(0, 3, 1, 2))
        picture(rows, run.directory / "samples.png")
        pipeline.to(torch.float16).save_pretrained(run.directory / "export")

    run.train(loss, exported=export)


if __name__ == "__main__":
    main()
