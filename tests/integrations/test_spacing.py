"""Quadratic spacing against the published sampler's loop, written down once more in float64, repeated
timesteps included.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from torch import Tensor

import tfmq
from tfmq.integrations.diffusers.pipelines import PipelineSampler
from tfmq.integrations.diffusers.spacing import QuadraticDDIMScheduler, spaced
from tfmq.recipes.recipe import Calibration
from tfmq.targets import open_sampler


def visited(steps: int) -> list[int]:
    """The timesteps of the publication, ascending."""
    return [int(value) for value in np.linspace(0, np.sqrt(1000 * 0.8), steps) ** 2]


def published(model: Callable[[Tensor, int], Tensor], x: Tensor, steps: int) -> Tensor:
    """DDIM without noise, as its authors loop: every timestep with the one before it, the last with a level
    of one.
    """
    levels = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    sequence = visited(steps)
    for timestep, following in zip(reversed(sequence), reversed([-1, *sequence[:-1]]), strict=True):
        level, later = (
            levels[timestep],
            levels[following] if following >= 0 else torch.tensor(1.0, dtype=torch.float64),
        )
        noise = model(x.float(), timestep).double()
        image = (x - noise * (1 - level).sqrt()) / level.sqrt()
        x = later.sqrt() * image + (1 - later).sqrt() * noise
    return x


@pytest.mark.parametrize("steps", [5, 20, 100])
def test_the_samples_are_those_of_the_published_loop(build: Callable[..., Any], steps: int) -> None:
    unet = build("unet")[0].module
    scheduler = QuadraticDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.flip(0).tolist() == sorted(set(visited(steps)))
    start = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = published(lambda x, t: unet(x, t).sample, start.double(), steps)
        x = start
        for timestep in scheduler.timesteps:
            x = scheduler.step(unet(x, timestep).sample, timestep, x).prev_sample
    assert float((x - expected).abs().max()) < 1e-3 * float(expected.abs().max())


def test_noise_is_that_of_the_formula(build: Callable[..., Any]) -> None:
    scheduler = QuadraticDDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(10)
    before, at = visited(10)[5:7]
    sample, noise = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)
    steps = [
        scheduler.step(torch.zeros_like(sample), at, sample, eta=eta, variance_noise=noise).prev_sample
        for eta in (0.0, 1.0)
    ]
    level, later = (scheduler.alphas_cumprod[timestep].double() for timestep in (at, before))
    deviation = ((1 - later) / (1 - level) * (1 - level / later)).sqrt()
    assert torch.allclose(steps[1] - steps[0], (deviation * noise).float(), atol=1e-5)
    assert len(scheduler.alphas_cumprod) == 1000


def test_a_recipe_draws_and_calibrates_with_it_and_the_pipeline_keeps_its_own(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    pipeline = DDIMPipeline(build("unet")[0].module, DDIMScheduler())
    before = pipeline.scheduler
    calibration = Calibration(samples=2, steps=5, interval=1, batch_size=2, eta=0.0, spacing="quadratic")
    result = tfmq.quantize(
        pipeline, replace(tfmq.scheme("rtn_w8a8"), calibration=calibration), output_dir=tmp_path / "q"
    )
    steps = pipeline.unet.tfmq_steps.timesteps.tolist()
    assert steps == sorted(set(visited(5))) and pipeline.scheduler is before
    assert result.manifest["provenance"]["recipe"]["calibration"]["spacing"] == "quadratic"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not calibrated")
        sampler = open_sampler(tmp_path / "q")
        images = sampler.run(range(2), steps=5, seed=0)
    assert sampler.describe()["options"]["spacing"] == "quadratic"
    plain = PipelineSampler(sampler.pipeline, options={"eta": 0.0})
    with pytest.warns(UserWarning, match="was not calibrated"):
        assert not torch.equal(plain.run(range(2), steps=5, seed=0), images)
    assert "spacing" not in plain.describe()["options"]


def test_other_schedulers_are_refused_with_advice(build: Callable[..., Any]) -> None:
    pipeline = DDPMPipeline(build("unet")[0].module, DDPMScheduler())
    with (
        pytest.raises(
            ValueError, match=r"quadratic spacing is one of DDIM's.*DDPMScheduler; set .*from_config"
        ),
        spaced(pipeline, "quadratic"),
    ):
        pass
    with pytest.raises(ValueError, match=r"calibration\.spacing is 'cubic'; it must be one of quadratic"):
        Calibration(spacing="cubic")  # type: ignore[arg-type]


def test_the_published_recipe_asks_for_it() -> None:
    assert tfmq.scheme("cifar10_ddim_w4a8").calibration.spacing == "quadratic"
    assert tfmq.scheme("ldm4_bedrooms_w4a8").calibration.spacing is None
