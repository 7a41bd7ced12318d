"""Distil `text` into `text-turbo`, which draws in one to four steps: latent consistency distillation.

    python training/turbo.py --latents runs/latents --teacher runs/text/export --output-dir runs/turbo

The student maps any point of a trajectory to its end (Song et al., 2023; in latents, with the teacher's
guidance inside: Luo et al., 2023). A batch is noised to one of the fifty timesteps of `LCMScheduler`; the
guided teacher takes one DDIM step to the next; the student's end from the first point is drawn to the
averaged student's end from the second. Text encoder and autoencoder are the teacher's.
"""

import argparse
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from diffusion import STEPS, build_scheduler, noised, picture
from latents import read_pool
from loop import Run, Schedule
from scenes import said
from text import assemble, build_tokenizer, sample
from torch import Generator, Tensor
from transformers import CLIPTextModel

# Timesteps of the teacher's trajectory, as `LCMScheduler` counts them: 19, 39, ..., 999.
ORIGIN = 50
STRIDE = STEPS // ORIGIN
# Of the pseudo-Huber loss (Song and Dhariwal, 2024), relative to the root of a latent's size.
HUBER = 0.03


def build_lcm() -> LCMScheduler:
    """The scheduler of the student, on the teacher's betas."""
    teacher = build_scheduler().config
    return LCMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule=teacher.beta_schedule,
        prediction_type=teacher.prediction_type,
        clip_sample=False,
        original_inference_steps=ORIGIN,
        steps_offset=1,
    )


class Ends:
    """Ends of trajectories from predicted velocities, under one schedule; the timestep -1 is the end
    itself.
    """

    def __init__(self) -> None:
        self.levels = torch.cat([build_scheduler().alphas_cumprod, torch.ones(1)])

    def clean(self, noisy: Tensor, timesteps: Tensor, velocity: Tensor) -> Tensor:
        """Return the latents `[B, 4, 16, 16]` that a velocity at `timesteps` `[B]` points to."""
        level = self.levels[timesteps].view(-1, 1, 1, 1)
        return level.sqrt() * noisy - (1 - level).sqrt() * velocity

    def moved(self, noisy: Tensor, timesteps: Tensor, velocity: Tensor, to: Tensor) -> Tensor:
        """Return where one DDIM step leads from `timesteps` to the timesteps `to` (Song et al., 2021,
        equation 12, without noise).
        """
        level, target = self.levels[timesteps].view(-1, 1, 1, 1), self.levels[to].view(-1, 1, 1, 1)
        noise = (1 - level).sqrt() * noisy + level.sqrt() * velocity
        return target.sqrt() * self.clean(noisy, timesteps, velocity) + (1 - target).sqrt() * noise


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--guidance", type=float, default=3.0, help="of the teacher; the student needs none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    pools = {held: read_pool(options.latents, part) for held, part in ((False, "train"), (True, "held_out"))}
    pipeline = StableDiffusionPipeline.from_pretrained(
        options.teacher, torch_dtype=torch.float32, safety_checker=None
    )
    encoder: CLIPTextModel = pipeline.text_encoder.requires_grad_(False).eval()
    vae: AutoencoderKL = pipeline.vae
    tokenizer = build_tokenizer()

    def copy() -> UNet2DConditionModel:
        unet = UNet2DConditionModel.from_config(pipeline.unet.config)
        unet.load_state_dict(pipeline.unet.state_dict())
        unet.set_attn_processor(AttnProcessor())
        return unet.to(memory_format=torch.channels_last)

    student, teacher, averaged = copy(), copy().requires_grad_(False), copy().requires_grad_(False)
    schedule = Schedule(
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        average=0.995,
        seed=options.seed,
    )
    run = Run(options.output_dir, student, schedule)
    for name, parameter in averaged.named_parameters():
        # The run moves these tensors after each step.
        parameter.data = run.average[name]
    nets = (student, teacher, averaged)
    predict, guide, follow = (torch.compile(net) if options.compile else net for net in nets)
    ends = Ends()

    def embedded(texts: list[str]) -> Tensor:
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return encoder(ids).last_hidden_state.float()

    def loss(generator: Generator, held: bool) -> Tensor:
        latents, scenes = pools[held]
        index = torch.randint(len(latents), (options.batch_size,), generator=generator)
        tokens = embedded([said(scenes[i], generator).caption() for i in index.tolist()])
        timesteps = torch.randint(1, ORIGIN + 1, (options.batch_size,), generator=generator) * STRIDE - 1
        batch = noised(latents[index], timesteps, generator)
        earlier = timesteps - STRIDE
        with torch.no_grad():
            without, towards = (
                guide(
                    batch.noisy.repeat(2, 1, 1, 1),
                    timesteps.repeat(2),
                    torch.cat([embedded([""]).expand_as(tokens), tokens]),
                    return_dict=False,
                )[0]
                .float()
                .chunk(2)
            )
            velocity = without + options.guidance * (towards - without)
            nearer = ends.moved(batch.noisy, timesteps, velocity, earlier)
            followed = follow(nearer, earlier.clamp(min=0), tokens, return_dict=False)[0].float()
            # The last step of the teacher ends the trajectory.
            target = torch.where(
                (earlier < 0).view(-1, 1, 1, 1), nearer, ends.clean(nearer, earlier, followed)
            )
        end = ends.clean(
            batch.noisy, timesteps, predict(batch.noisy, timesteps, tokens, return_dict=False)[0].float()
        )
        scale = HUBER * end[0].numel() ** 0.5
        return (((end - target).square().sum((1, 2, 3)) + scale**2).sqrt() - scale).mean()

    def export(run: Run) -> None:
        average = UNet2DConditionModel.from_config(pipeline.unet.config)
        run.load_average(average)
        turbo = assemble(deepcopy(vae), deepcopy(encoder), average, build_lcm())
        picture(
            [row for steps in (1, 2, 4) for row in sample(turbo, steps=steps, guidance=1.0)[:1]],
            run.directory / "samples.png",
        )
        turbo.to(torch.float16).save_pretrained(run.directory / "export")

    run.train(loss, exported=export)


if __name__ == "__main__":
    main()
