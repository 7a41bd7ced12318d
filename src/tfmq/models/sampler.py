"""Samplers, which run a denoiser. Below the integrations they are the only view of pipelines and
schedulers.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from zlib import crc32

import torch
from torch import Tensor, nn

from tfmq.models.conditions import check_rows, described, in_one_call, in_turn
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.storage.digest import tensor_digest


class Sampler(Protocol):
    """Draws images with a denoiser.

    `run(indices, steps=..., seed=...)` draws the images with those indices of the stream `seed`, whatever the
    batch they are drawn in, and returns them as float `[N, C, H, W]` in [0, 1] (latents where there is no
    decoder). The denoiser is called on the way, so that a calibration can record its inputs. `example()`
    gives the inputs of one call, `describe()` what the images depend on beside the weights, as JSON values: a
    resumed job must find it unchanged.
    """

    denoiser: Denoiser

    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Draw the images `indices` of the stream `seed`, float `[N, C, H, W]` in [0, 1]."""

    def example(self) -> Inputs:
        """Return the inputs of one call of the denoiser."""

    def describe(self) -> dict[str, Any]:
        """Return what the images depend on beside the weights, as JSON values."""


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of image `index` of the stream `seed`; no two images of a stream have the same."""
    # torch uses only the low 32 bits of a seed on the CPU, so both numbers have to be in them.
    return torch.Generator().manual_seed((crc32(str(seed).encode()) + index) % 2**32)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans, 2022, eq. 6): the output is `without + scale (towards -
    without)`.

    Args:
        unconditional: conditions of the rows without, by argument name; tensors have one row, which is
            repeated. What is not among them is as in the rows towards.
        scale: the scale of the formula; 1 means no guidance.
        calls: 1 makes one call with the rows without and then those towards, 2 makes one call for each. What
            is calibrated is what is called.
    """

    unconditional: Mapping[str, Any]
    scale: float
    calls: int = 1

    def __post_init__(self) -> None:
        if self.calls not in (1, 2):
            raise ValueError(f"guidance takes 1 or 2 calls, not {self.calls}")


def unit_range(sample: Tensor) -> Tensor:
    """Map a sample in [-1, 1] to an image in [0, 1], clipped."""
    return (sample / 2 + 0.5).clamp(0, 1)


class LoopSampler:
    """The plain sampling loop over any scheduler with diffusers' interface, for a denoiser without a
    pipeline.

    Args:
        denoiser: the model.
        scheduler: has `set_timesteps`, `timesteps` and `step`; `init_noise_sigma` and `scale_model_input`
            too, unless neither scales anything, as in flow matching.
        shape: shape of one sample, `[C, H, W]`.
        conditions: further denoiser arguments that all images share; tensors have one row, which is repeated.
        per_image: denoiser arguments that differ among images: image `i` gets row `i % N` of a tensor with
            `N` rows.
        guidance: calls the denoiser without the conditions too.
        to_images: maps final samples `[N, C, H, W]` to images in [0, 1]. A job tells two functions apart by
            their names, and modules by their weights: give another map another name.

    Raises:
        ValueError: tensors of `per_image` do not go together, or the halves of guidance do not fit one call.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        *,
        shape: tuple[int, ...],
        conditions: Mapping[str, Any] | None = None,
        per_image: Mapping[str, Any] | None = None,
        guidance: Guidance | None = None,
        to_images: Callable[[Tensor], Tensor] = unit_range,
    ) -> None:
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.shape = tuple(shape)
        self.conditions = dict(conditions or {})
        self.per_image = dict(per_image or {})
        self.guidance = guidance
        self.to_images = to_images
        check_rows(self.per_image)
        if twice := sorted(self.conditions.keys() & self.per_image.keys()):
            raise ValueError(
                f"{twice[0]} is among the conditions that images share, and "
                "among those of each; leave it out of one"
            )
        # Put the inputs of one call together now, so that what does not fit is refused at once and not after
        # hours.
        self._guided(self._inputs(range(1)))

    def _place(self) -> Tensor:
        """Return a tensor of the dtype and on the device that the denoiser computes with."""
        module = self.denoiser.module
        floating = (
            tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()
        )
        return next(floating, torch.empty(0))

    def _inputs(self, indices: range) -> Inputs:
        """Return inputs of a call for the images `indices`, where the conditions are theirs."""
        place = self._place()
        timestep = torch.ones(1, dtype=torch.long, device=place.device)
        sample = torch.zeros(1, *self.shape, dtype=place.dtype, device=place.device)
        shared = Inputs(sample, timestep, self.conditions).resized(len(indices))
        given = Inputs(
            shared.sample, shared.timestep, {**shared.conditions, **in_turn(self.per_image, indices)}
        )
        return given.map(lambda tensor: tensor.to(place.device))

    def _guided(self, call: Inputs) -> list[Inputs]:
        """Return the calls that guidance makes of one: the one with both halves, or that without and that
        towards; without guidance itself.
        """
        if self.guidance is None:
            return [call]
        one = Inputs(call.sample[:1], call.timestep[:1], self.guidance.unconditional)
        others = one.resized(len(call)).map(lambda tensor: tensor.to(call.sample.device)).conditions
        without = {**call.conditions, **others}
        if self.guidance.calls == 2:
            return [Inputs(call.sample, call.timestep, without), call]
        return [in_one_call(Inputs(call.sample, call.timestep, without), call)]

    def example(self) -> Inputs:
        """Return one call's inputs: the image 0 with its conditions."""
        return self._inputs(range(1))

    def describe(self) -> dict[str, Any]:
        """Return the scheduler's settings, the shape of a sample, conditions, guidance and the map to
        images.
        """
        config = getattr(self.scheduler, "config", {})
        settings = {
            "class": type(self.scheduler).__name__,
            **{k: repr(v) for k, v in dict(config).items() if not k.startswith("_")},
        }
        guidance = self.guidance
        return {
            "scheduler": settings,
            "shape": list(self.shape),
            "conditions": described(self.conditions),
            "per_image": described(self.per_image),
            "guidance": guidance
            and {
                "unconditional": described(guidance.unconditional),
                "scale": guidance.scale,
                "calls": guidance.calls,
            },
            "to_images": _identity(self.to_images),
        }

    @torch.no_grad()
    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Draw images; see `Sampler`."""
        given = self._inputs(indices)
        generators = [image_generator(seed, index) for index in indices]
        self.scheduler.set_timesteps(steps)
        noise = torch.stack([torch.randn(self.shape, generator=generator) for generator in generators])
        sample = noise.to(given.sample) * getattr(self.scheduler, "init_noise_sigma", 1.0)
        scale = getattr(self.scheduler, "scale_model_input", lambda unscaled, _: unscaled)
        # Deterministic schedulers take no generator.
        noise_source = (
            {"generator": generators}
            if "generator" in inspect.signature(self.scheduler.step).parameters
            else {}
        )
        for timestep in self.scheduler.timesteps:
            batch = timestep.to(given.timestep.device).expand(len(indices))
            output = self._predicted(Inputs(scale(sample, timestep), batch, given.conditions))
            sample = self.scheduler.step(output, timestep, sample, **noise_source).prev_sample
        return self.to_images(sample).float().cpu()

    def _predicted(self, call: Inputs) -> Tensor:
        """Return the denoiser's output, guided where there is guidance."""
        output = torch.cat([self.denoiser(each) for each in self._guided(call)])
        if self.guidance is None:
            return output
        without, towards = output.chunk(2)
        return without + self.guidance.scale * (towards - without)


def _identity(function: Callable[..., Any]) -> dict[str, Any]:
    """Return what tells a function from others: its name, and the weights of the module that it is or belongs
    to.
    """
    owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    weights = tensor_digest(owner.state_dict()) if isinstance(owner, nn.Module) else None
    return {
        "function": f"{getattr(function, '__module__', type(function).__module__)}.{name}",
        "weights": weights,
    }
