"""Calibration and sampling with every kind of scheduler, at the timesteps that it steps through."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

import tfmq
from tfmq.models.sampler import LoopSampler
from tfmq.nn.swap import steps_of
from tfmq.recipes import Calibration

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SCHEDULERS: dict[str, Callable[[], Any]] = {
    "DDIM": diffusers.DDIMScheduler,
    "DDPM": diffusers.DDPMScheduler,
    "PNDM": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "Euler": diffusers.EulerDiscreteScheduler,
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min"),
    "UniPC": diffusers.UniPCMultistepScheduler,
    "flow-matching Euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "continuous EDM": lambda: diffusers.EDMEulerScheduler(sigma_max=20.0),
}
CONTINUOUS = {"Euler", "flow-matching Euler", "continuous EDM"}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_schedule_is_calibrated_exactly_and_another_one_is_warned_about(
    sampler: Callable[..., LoopSampler], name: str
) -> None:
    made = sampler("plain", scheduler=SCHEDULERS[name]())
    recipe = replace(
        tfmq.scheme("w8a8"), calibration=Calibration(samples=1, steps=5, interval=1, batch_size=1)
    )
    learning = replace(recipe.temporal.learning, iterations=0)
    temporal = replace(recipe.temporal, learning=learning)
    tfmq.quantize(
        made, replace(recipe, rounding=replace(recipe.rounding, solver="nearest"), temporal=temporal)
    )
    timesteps = steps_of(made.denoiser.module).timesteps
    assert len(timesteps) >= 5 and bool((timesteps != timesteps.round()).any()) == (name in CONTINUOUS)
    expected = sampler("plain", scheduler=SCHEDULERS[name]()).run(range(2), steps=5, seed=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not calibrated")
        images = made.run(range(2), steps=5, seed=0)
    assert 0 < float((images - expected).abs().mean()) < 0.1
    with pytest.warns(UserWarning, match="was not calibrated"):
        assert torch.isfinite(made.run(range(1), steps=4, seed=0)).all()
