"""What the denoisers' trainings share: the schedule, noised latents with their velocity, and sheets of
samples.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import Generator, Tensor

STEPS = 1000


def build_scheduler() -> DDIMScheduler:
    """Thousand training steps, cosine betas, velocity prediction."""
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,
    )


@dataclass(frozen=True)
class Noised:
    """Noised latents `[B, 4, 16, 16]`, the timesteps `[B]`, and the velocity alpha * noise - sigma * clean
    that is to be predicted.
    """

    noisy: Tensor
    timesteps: Tensor
    velocity: Tensor


def noised(clean: Tensor, timesteps: Tensor, generator: Generator) -> Noised:
    """Return clean latents under new noise (Salimans and Ho, 2022, appendix D)."""
    noise = torch.randn(clean.shape, generator=generator)
    level = build_scheduler().alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = (level.sqrt() * clean + (1 - level).sqrt() * noise).contiguous(memory_format=torch.channels_last)
    return Noised(noisy, timesteps, level.sqrt() * noise - (1 - level).sqrt() * clean)


def draw_timesteps(count: int, generator: Generator) -> Tensor:
    """Return timesteps `[count]`: the later of two uniform draws each, as captions and classes matter where
    noise is strong.
    """
    return torch.randint(STEPS, (2, count), generator=generator).amax(0)


def picture(rows: list[Tensor], path: Path) -> None:
    """Save rows of images `[N, 3, H, W]` in [0, 1] as one picture, twice as large."""
    sheet = torch.cat([torch.cat(list(row.float()), dim=2) for row in rows], dim=1)
    pixels = (sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).resize((2 * pixels.shape[1], 2 * pixels.shape[0]), Image.NEAREST).save(path)
