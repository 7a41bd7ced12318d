"""Drawing images: bytes, batches, and noise that belongs to an image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tfmq.evaluation.sampling import SamplingError, draw, to_bytes
from tfmq.models.sampler import LoopSampler

Make = Callable[..., LoopSampler]


def test_to_bytes_rounds_clips_and_reorders() -> None:
    images = torch.tensor([0.0, 0.5 / 255, 0.51 / 255, 1.0, 1.7, -3.0]).view(1, 3, 1, 2)
    assert to_bytes(images).tolist() == [[[[0, 1, 255], [0, 255, 0]]]]
    assert to_bytes(torch.rand(2, 1, 4, 5)).shape == (2, 4, 5, 1)


@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (1, 2, 8, 8), (3, 8, 8)])
def test_to_bytes_refuses_what_is_no_image(shape: tuple[int, ...]) -> None:
    with pytest.raises(SamplingError, match="1 or 3 channels"):
        to_bytes(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_to_bytes_names_the_broken_image(value: float) -> None:
    images = torch.zeros(3, 1, 2, 2)
    images[1, 0, 1, 1] = value
    with pytest.raises(SamplingError, match="image 17 "):
        to_bytes(images, first=16)


def test_images_depend_on_seed_and_index_alone(sampler: Make) -> None:
    every = draw(sampler(), 5, steps=3, seed=4, batch_size=5)
    assert every.dtype == np.uint8 and every.shape == (5, 8, 8, 3)
    in_parts = draw(sampler(), 5, steps=3, seed=4, batch_size=2)
    # Kernels may sum in another order for another batch size.
    assert np.abs(every.astype(int) - in_parts.astype(int)).max() <= 1
    assert np.array_equal(draw(sampler(), 2, steps=3, seed=4, batch_size=2), in_parts[:2])
    assert not np.array_equal(every[0], every[1])
    assert not np.array_equal(every, draw(sampler(), 5, steps=3, seed=5, batch_size=5))


def test_progress_counts_denoiser_calls(sampler: Make, bar: "Callable[..., object]") -> None:
    draw(sampler(), 5, steps=3, seed=0, batch_size=2, description="drawing", progress=bar)  # type: ignore[arg-type]
    assert bar.seen == {"drawing": (9, 9)}  # type: ignore[attr-defined]


def test_hooks_are_gone_after_a_failure(sampler: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = sampler()

    def fail(*_: object, **__: object) -> Tensor:
        raise OSError("out of luck")

    monkeypatch.setattr(made, "run", fail)
    with pytest.raises(OSError, match="luck"):
        draw(made, 1, steps=1, seed=0)
    assert not made.denoiser.module._forward_pre_hooks


@pytest.mark.parametrize("numbers", [(0, 1, 1), (1, 0, 1), (1, 1, 0)])
def test_impossible_numbers(sampler: Make, numbers: tuple[int, int, int]) -> None:
    count, steps, batch = numbers
    with pytest.raises(ValueError, match="at least 1"):
        draw(sampler(), count, steps=steps, seed=0, batch_size=batch)
