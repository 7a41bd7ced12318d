"""What a denoiser is run by: the only view of pipelines and schedulers below the integrations."""

import inspect
from collections.abc import Mapping
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor

from tfmq.models.denoiser import Denoiser, Inputs


class Sampler(Protocol):
    """Draws images with a denoiser.

    `run(indices, steps=..., seed=...)` draws the images with those indices of the stream `seed`, whatever the batch they are drawn in, and
    returns them as float `[N, C, H, W]` in [0, 1] (latents where there is no decoder). The denoiser is called on the way, so that a
    calibration can record its inputs. `example()` gives the inputs of one call, `describe()` what the images depend on beside the weights,
    as JSON values: a resumed job must find it unchanged.
    """

    denoiser: Denoiser

    def run(self, indices: range, *, steps: int, seed: int) -> Tensor: ...

    def example(self) -> Inputs: ...

    def describe(self) -> dict[str, Any]: ...


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of image `index` of the stream `seed`; no two images of a stream have the same."""
    # On the CPU torch looks at the low 32 bits of a seed alone, so both numbers have to be in there.
    return torch.Generator().manual_seed((crc32(str(seed).encode()) + index) % 2**32)


class LoopSampler:
    """The plain sampling loop over any scheduler with diffusers' interface, for a denoiser without a pipeline.

    Args:
        denoiser: the model.
        scheduler: has `set_timesteps`, `timesteps` and `step`; `init_noise_sigma` and `scale_model_input` too, unless neither scales anything,
            as in flow matching.
        shape: of one sample, `[C, H, W]`.
        conditions: further denoiser arguments; tensors have one row, which is repeated.
    """

    def __init__(self, denoiser: Denoiser, scheduler: Any, *, shape: tuple[int, ...], conditions: Mapping[str, Any] | None = None) -> None:
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.shape = tuple(shape)
        self.conditions = dict(conditions or {})

    def example(self) -> Inputs:
        """Return one call's inputs."""
        parameter = next(self.denoiser.module.parameters())
        timestep = torch.ones(1, dtype=torch.long, device=parameter.device)
        return Inputs(torch.zeros(1, *self.shape, dtype=parameter.dtype, device=parameter.device), timestep, self.conditions)

    def describe(self) -> dict[str, Any]:
        """Return the scheduler's settings and the shape of a sample."""
        config = getattr(self.scheduler, "config", {})
        settings = {"class": type(self.scheduler).__name__, **{k: repr(v) for k, v in dict(config).items() if not k.startswith("_")}}
        return {"scheduler": settings, "shape": list(self.shape), "conditions": sorted(self.conditions)}

    @torch.no_grad()
    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Draw images; see `Sampler`."""
        example = self.example()
        generators = [image_generator(seed, index) for index in indices]
        self.scheduler.set_timesteps(steps)
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        sample = noise.to(example.sample) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale = getattr(self.scheduler, "scale_model_input", lambda unscaled, _: unscaled)
        conditions = example.resized(len(indices)).conditions
        # Deterministic schedulers take no generator.
        noise_source = {"generator": generators} if "generator" in inspect.signature(self.scheduler.step).parameters else {}
        for timestep in self.scheduler.timesteps:
            batch = timestep.to(example.timestep.device).expand(len(indices))
            output = self.denoiser(Inputs(scale(sample, timestep), batch, conditions))
            sample = self.scheduler.step(output, timestep, sample, **noise_source).prev_sample
        return (sample / 2 + 0.5).clamp(0, 1).float().cpu()
