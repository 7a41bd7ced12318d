"""Estimate from a few calls what drawing images will take, before the first image is drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tfmq.evaluation.cost.system import memory_bytes
from tfmq.evaluation.cost.trajectory import rehearsed
from tfmq.models.sampler import Sampler
from tfmq.stopwatch import seconds_of

# Seconds of a day.
DAY = 86400.0
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True)
class Outlay:
    """Seconds of drawing and of one denoiser call, and the bytes of the images."""

    seconds: float
    call_seconds: float
    image_bytes: int


@torch.no_grad()
def drawing(sampler: Sampler, num_images: int, *, steps: int, batch_size: int) -> Outlay:
    """Return about what drawing `num_images` images takes: one batch is drawn with a denoiser that computes
    once, and one call is timed.
    """
    size = min(batch_size, num_images)
    found = rehearsed(sampler, images=size, steps=steps)
    a_call = seconds_of(lambda: sampler.denoiser(found.call))
    per_batch = found.calls * a_call + found.around
    return Outlay(per_batch * num_images / size, a_call, found.image_bytes * num_images)


def available_bytes() -> int | None:
    """Return the memory that is to be had without swapping; None where the system does not say."""
    if MEMORY.exists():
        fields = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines() if ":" in line)
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return memory_bytes()


def check_memory(outlays: Sequence[Outlay], num_images: int) -> float:
    """Return the seconds of all `outlays`, each of `num_images` images that are held at once.

    Raises:
        ValueError: the memory does not hold them; says what they take.
    """
    seconds, needed, free = (
        sum(each.seconds for each in outlays),
        sum(each.image_bytes for each in outlays),
        available_bytes(),
    )
    if free is not None and needed > free:
        raise ValueError(
            f"{num_images} images take {needed / 1e9:.3g} GB of memory, where {free / 1e9:.3g} "
            f"GB are free, and about {seconds / DAY:.3g} days; "
            "draw fewer (--num-images)"
        )
    return seconds


def existing(path: Path) -> Path:
    """Return the folder that a path which may not exist yet lies in, the nearest there is."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
