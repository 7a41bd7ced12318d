"""Train the autoencoder that `text`, `text-turbo` and `dit` share: scenes of 64x64 to latents of 4x16x16.

    python training/autoencoder.py --digits DIR --output-dir runs/autoencoder

DIR holds the gzipped IDX files of the MNIST test set. The loss is the absolute and the squared error of the
picture, and a small KL term that keeps latents near a unit Gaussian (Rombach et al., 2022, section 3.1).
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from loop import Run, Schedule
from scenes import JUDGED, PAINTED, read_digits, scene_batch
from torch import Generator, Tensor

KL = 1e-6


def build() -> AutoencoderKL:
    """Three resolutions, one residual block each, attention in the middle."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
    )


@torch.no_grad()
def quality(model: AutoencoderKL, images: Tensor) -> float:
    """Return the mean PSNR in dB of decoded means of `images` `[N, 3, 64, 64]` in [0, 1]."""
    decoded = torch.cat(
        [model.decode(model.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(32)]
    )
    error = ((decoded / 2 + 0.5).clamp(0, 1) - images).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--digits", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2_800)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--learning-rate", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    digits, labels = read_digits(options.digits)
    torch.manual_seed(options.seed)
    model = build().to(memory_format=torch.channels_last)
    schedule = Schedule(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        average=0.998,
        seed=options.seed,
    )
    run = Run(options.output_dir, model, schedule)
    # Digits of its own, and combinations that training does not see.
    _, unseen = scene_batch(digits[JUDGED], labels[JUDGED], 256, Generator().manual_seed(1), held=True)

    def loss(generator: Generator, held: bool) -> Tensor:
        part = JUDGED if held else PAINTED
        _, images = scene_batch(digits[part], labels[part], options.batch_size, generator, held=held)
        target = images.to(memory_format=torch.channels_last) * 2 - 1
        posterior = model.encode(target).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
        error = model.decode(latents).sample.float() - target
        divergence = (
            posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        ).sum((1, 2, 3)).mean() / 2
        return error.abs().mean() + error.square().mean() + KL * divergence

    def export(run: Run) -> None:
        average = build()
        run.load_average(average)
        average.eval()
        latents = torch.cat(
            [average.encode(part * 2 - 1).latent_dist.mode() for part in unseen.split(32)]
        ).detach()
        psnr = quality(average, unseen)
        print(
            {
                "step": run.step,
                "held_out_psnr": round(psnr, 2),
                "latent_std": [round(v, 3) for v in latents.std((0, 2, 3)).tolist()],
            },
            flush=True,
        )
        average.register_to_config(scaling_factor=float(1 / latents.std()))
        average.to(torch.float16).save_pretrained(run.directory / "vae")

    run.train(loss, exported=export)


if __name__ == "__main__":
    main()
