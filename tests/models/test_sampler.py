from collections.abc import Callable
from typing import Any

import pytest
import torch

from tfmq.models.sampler import LoopSampler, image_generator


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler()
    together = drawn.run(range(2, 5), steps=3, seed=7)
    assert together.shape == (3, 3, 8, 8) and together.min() >= 0 and together.max() <= 1
    for index in range(2, 5):
        alone = drawn.run(range(index, index + 1), steps=3, seed=7)
        torch.testing.assert_close(alone[0], together[index - 2], atol=1e-5, rtol=0)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    assert not torch.allclose(drawn.run(range(2, 3), steps=3, seed=8)[0], together[0], atol=1e-3)


def test_streams_do_not_overlap() -> None:
    def first(seed: int, index: int) -> float:
        return float(torch.rand(1, generator=image_generator(seed, index), dtype=torch.float64))

    drawn = [first(seed, index) for seed in range(5) for index in range(50)]
    assert len(set(drawn)) == len(drawn)


def test_the_loop_is_diffusers_own(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler()
    noise = torch.randn(1, 3, 8, 8, generator=image_generator(3, 0))
    scheduler, sample = drawn.scheduler, noise
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            sample = scheduler.step(drawn.denoiser.module(sample, timestep).sample, timestep, sample).prev_sample
    torch.testing.assert_close(drawn.run(range(1), steps=4, seed=3), (sample / 2 + 0.5).clamp(0, 1))


def test_the_denoiser_sees_the_schedule_once_per_sample_and_the_conditions(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler("class_conditional")
    seen: list[tuple[list[int], Any]] = []
    handle = drawn.denoiser.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["timestep"].tolist(), kwargs["class_labels"].tolist())), with_kwargs=True
    )
    drawn.run(range(2), steps=2, seed=0)
    handle.remove()
    assert seen == [([500, 500], [3, 3]), ([0, 0], [3, 3])]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedulers_that_scale_the_input_and_step_between_timesteps_work(sampler: Callable[..., LoopSampler]) -> None:
    from diffusers import EulerDiscreteScheduler

    images = sampler(scheduler=EulerDiscreteScheduler()).run(range(2), steps=3, seed=0)
    assert torch.isfinite(images).all() and images.std() > 0


def test_the_example_is_one_call_on_the_models_device_and_dtype(sampler: Callable[..., LoopSampler]) -> None:
    drawn = sampler("sd3")
    drawn.denoiser.module.to(torch.float64)
    example = drawn.example()
    assert example.sample.shape == (1, 4, 8, 8) and example.sample.dtype == torch.float64
    assert set(example.conditions) == {"encoder_hidden_states", "pooled_projections"}


@pytest.mark.parametrize("seed", [0, 1234, 2**31])
def test_ordinary_seeds_are_accepted(seed: int) -> None:
    image_generator(seed, 10**6)
