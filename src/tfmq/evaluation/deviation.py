"""How far a quantized model strays from the full-precision trajectory, step by step, from the same noise."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tfmq.evaluation.sampling import Images, to_bytes
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import Sampler
from tfmq.nn.watch import ModuleCall, watched
from tfmq.numerics.errors import relative_error


@dataclass(frozen=True)
class Walk:
    """One batch of images, uint8 `[N, H, W, C]`, and the states they came from: the sample of every denoiser
    call, with its timestep.

    `latent` `[N, ...]` is what the images were decoded from; None where the model draws pixels.
    """

    images: Images
    timesteps: Tensor
    states: tuple[Tensor, ...]
    latent: Tensor | None = None


@runtime_checkable
class Decoding(Protocol):
    """A sampler that may decode its images from latents: `noted_latents` collects what is decoded while the
    context is open.
    """

    def noted_latents(self) -> AbstractContextManager[list[Tensor]]:
        """Collect the latents that are decoded while the context is open."""


@contextmanager
def _noted_calls(denoiser: Denoiser) -> Iterator[list[Inputs]]:
    """Collect the inputs of every denoiser call while the context is open."""
    calls: list[Inputs] = []

    def note(call: ModuleCall) -> None:
        inputs = denoiser.bind(call.args, call.kwargs)
        calls.append(inputs.map(lambda tensor: tensor.detach().cpu().clone()))

    with watched(denoiser.module, before=note):
        yield calls


@torch.no_grad()
def follow(sampler: Sampler, indices: range, *, steps: int, seed: int) -> Walk:
    """Draw the images `indices` of the stream `seed` and keep their states.

    Raises:
        SamplingError: what is drawn is no image.
    """
    noted: AbstractContextManager[list[Tensor]] = (
        sampler.noted_latents() if isinstance(sampler, Decoding) else nullcontext([])
    )
    with _noted_calls(sampler.denoiser) as calls, noted as decoded:
        images = to_bytes(sampler.run(indices, steps=steps, seed=seed).detach().cpu(), first=indices.start)
    timesteps = torch.stack([call.timestep.flatten()[0].float() for call in calls])
    latent = torch.cat([part.cpu() for part in decoded]).reshape(len(images), -1) if decoded else None
    return Walk(images, timesteps, tuple(call.sample for call in calls), latent)


def deviation(reference: Walk, other: Walk) -> Tensor:
    """Return `||x_t - x'_t|| / ||x_t||` of every call and image, `[calls, N]`.

    Where guidance calls the denoiser with each sample twice, both rows are of the same image and equal.

    Raises:
        ValueError: the two made other calls: their schedules differ.
    """
    if not torch.equal(reference.timesteps, other.timesteps):
        raise ValueError(
            f"the models are called at other timesteps ({len(reference.timesteps)} "
            f"and {len(other.timesteps)} calls); use one scheduler"
        )
    count = len(reference.images)
    rows = [
        relative_error(a.flatten(1), b.flatten(1))
        for a, b in zip(reference.states, other.states, strict=True)
    ]
    return torch.stack([row.reshape(-1, count).mean(dim=0) for row in rows])


def latent_error(reference: Walk, other: Walk) -> Tensor | None:
    """Return `||z - z'|| / ||z||` of what each image was decoded from, `[N]`; None where the models draw
    pixels.

    Where the model works on latents, the states of `deviation` are latents too: those on the way to this one.
    """
    if reference.latent is None or other.latent is None:
        return None
    return relative_error(reference.latent.flatten(1), other.latent.flatten(1))


@dataclass(frozen=True)
class Trajectory:
    """Relative error of the state at each denoiser call, from noise to image: mean over images, and that of
    the image that strays most.

    `latent_mean` and `latent_worst` are the same of what the images are decoded from, which the last step
    leaves; None without a decoder.
    """

    timesteps: tuple[float, ...]
    mean: tuple[float, ...]
    worst: tuple[float, ...]
    latent_mean: float | None = None
    latent_worst: float | None = None

    def values(self) -> dict[str, Any]:
        """Return the trajectory as values that JSON keeps."""
        latent = None if self.latent_mean is None else {"mean": self.latent_mean, "worst": self.latent_worst}
        return {
            "timesteps": list(self.timesteps),
            "mean": list(self.mean),
            "worst": list(self.worst),
            "latent_error": latent,
        }


def summarized(timesteps: Tensor, errors: Tensor, latent: Tensor | None = None) -> Trajectory:
    """Return the trajectory of errors `[calls, N]`, and of `latent` `[N]` where images are decoded."""
    table = errors.double().numpy()
    found = (
        tuple(timesteps.tolist()),
        tuple(np.mean(table, axis=1).tolist()),
        tuple(np.max(table, axis=1).tolist()),
    )
    if latent is None:
        return Trajectory(*found)
    return Trajectory(*found, float(latent.double().mean()), float(latent.double().max()))


def in_words(trajectory: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the values of a trajectory say, as names and texts."""
    rows = [
        (
            "trajectory",
            f"relative error {trajectory['mean'][-1]:.3g} at the last of {len(trajectory['mean'])} calls",
        )
    ]
    if latent := trajectory["latent_error"]:
        rows.append(
            (
                "latent error",
                (
                    f"relative error {latent['mean']:.3g} mean, {latent['worst']:.3g} "
                    "worst, of what images are decoded from"
                ),
            )
        )
    return rows
