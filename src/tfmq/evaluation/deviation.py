"""How far a quantized model strays from the full-precision trajectory, step by step, from the same noise."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tfmq.evaluation.sampling import Images, to_bytes
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import Sampler
from tfmq.numerics.errors import relative_error


@dataclass(frozen=True)
class Walk:
    """One batch of images, uint8 `[N, H, W, C]`, and the states they came from: the sample of every denoiser call, with its timestep."""

    images: Images
    timesteps: Tensor
    states: tuple[Tensor, ...]


@contextmanager
def _noted_calls(denoiser: Denoiser) -> Iterator[list[Inputs]]:
    """Collect the inputs of every denoiser call while the context is open."""
    calls: list[Inputs] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(denoiser.bind(args, kwargs).map(lambda tensor: tensor.detach().cpu().clone()))

    handle = denoiser.module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def follow(sampler: Sampler, indices: range, *, steps: int, seed: int) -> Walk:
    """Draw the images `indices` of the stream `seed` and keep their states.

    Raises:
        SamplingError: what is drawn is no image.
    """
    with _noted_calls(sampler.denoiser) as calls:
        images = to_bytes(sampler.run(indices, steps=steps, seed=seed).detach().cpu(), first=indices.start)
    timesteps = torch.stack([call.timestep.flatten()[0].float() for call in calls])
    return Walk(images, timesteps, tuple(call.sample for call in calls))


def deviation(reference: Walk, other: Walk) -> Tensor:
    """Return `||x_t - x'_t|| / ||x_t||` of every call and image, `[calls, N]`.

    Where guidance calls the denoiser with each sample twice, both rows are of the same image and equal.

    Raises:
        ValueError: the two made other calls: their schedules differ.
    """
    if not torch.equal(reference.timesteps, other.timesteps):
        raise ValueError(f"the models are called at other timesteps ({len(reference.timesteps)} and {len(other.timesteps)} calls); use one scheduler")
    count = len(reference.images)
    rows = [relative_error(a.flatten(1), b.flatten(1)) for a, b in zip(reference.states, other.states, strict=True)]
    return torch.stack([row.reshape(-1, count).mean(dim=0) for row in rows])


@dataclass(frozen=True)
class Trajectory:
    """Relative error of the state at each denoiser call, from noise to image: mean over images, and that of the image that strays most.

    The last state is what the last step makes the image or its latent from; `latent_error` is its mean error.
    """

    timesteps: tuple[float, ...]
    mean: tuple[float, ...]
    worst: tuple[float, ...]

    @property
    def latent_error(self) -> float:
        """Mean relative error at the last call."""
        return self.mean[-1]

    def values(self) -> dict[str, Any]:
        """Return the trajectory as values that JSON keeps."""
        lists = {name: list(numbers) for name, numbers in asdict(self).items()}
        return {**lists, "latent_error": self.latent_error}


def summarized(timesteps: Tensor, errors: Tensor) -> Trajectory:
    """Return the trajectory of errors `[calls, N]`."""
    table = errors.double().numpy()
    return Trajectory(tuple(timesteps.tolist()), tuple(np.mean(table, axis=1).tolist()), tuple(np.max(table, axis=1).tolist()))
