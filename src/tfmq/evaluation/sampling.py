"""Draw images as arrays of bytes."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tfmq.models.sampler import Sampler
from tfmq.nn.watch import watched
from tfmq.progress import Progress, silent

Images = NDArray[np.uint8]


class SamplingError(RuntimeError):
    """A model drew something that is no image; names which one."""


def as_colour(images: Images) -> Images:
    """Return images `[N, H, W, 1 or 3]` with three channels."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images


def to_bytes(images: Tensor, *, first: int = 0) -> Images:
    """Return images `[N, C, H, W]` in [0, 1] as uint8 `[N, H, W, C]`, rounded to nearest; values outside are
    clipped.

    Raises:
        SamplingError: NaN or infinite values, or a number of channels other than 1 or 3; `first` is the index
            of the first image.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise SamplingError(
            "expected images [N, C, H, W] of 1 or 3 channels, got "
            f"{tuple(images.shape)}; latents need a decoder to be seen"
        )
    broken = ~images.isfinite().flatten(1).all(dim=1)
    if broken.any():
        raise SamplingError(f"image {first + int(broken.nonzero()[0])} holds NaN or infinite values")
    array: Images = (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return array


def batches(num_images: int, batch_size: int) -> list[range]:
    """Return the images 0 to `num_images - 1` in batches.

    Raises:
        ValueError: fewer than one image, or than one in a batch.
    """
    if min(num_images, batch_size) < 1:
        raise ValueError(f"num_images and batch_size must be at least 1, got {num_images} and {batch_size}")
    return [range(start, min(start + batch_size, num_images)) for start in range(0, num_images, batch_size)]


def draw_batch(sampler: Sampler, indices: range, *, steps: int, seed: int) -> Images:
    """Draw the images `indices` of the stream `seed`, uint8 `[N, H, W, C]`.

    Raises:
        ValueError: fewer than one step.
        SamplingError: see `to_bytes`.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return to_bytes(sampler.run(indices, steps=steps, seed=seed).detach().cpu(), first=indices.start)


def draw(
    sampler: Sampler,
    num_images: int,
    *,
    steps: int,
    seed: int,
    batch_size: int = 16,
    description: str = "sampling",
    progress: Progress = silent,
) -> Images:
    """Draw the images 0 to `num_images - 1` of the stream `seed`, uint8 `[N, H, W, C]`.

    The noise of an image depends on `(seed, index)` alone, so that two samplers given the same seed start
    from the same noise, and more images leave the first ones as they are (up to the last bit of kernels that
    sum in another order for another batch size).

    Raises:
        ValueError: fewer than one image or step.
        SamplingError: see `to_bytes`.
    """
    ranges = batches(num_images, batch_size)
    with (
        progress(description, len(ranges) * steps) as advance,
        watched(sampler.denoiser.module, before=lambda _: advance()),
    ):
        return np.concatenate([draw_batch(sampler, indices, steps=steps, seed=seed) for indices in ranges])
