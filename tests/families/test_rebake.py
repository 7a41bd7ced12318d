"""`tfmq.rebake`: another schedule in one call."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import tfmq
from tfmq.artifact import stored_manifest
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.models.sampler import LoopSampler
from tfmq.nn.swap import steps_of
from tfmq.quantizers.activation import ActivationQuantizer

Make = Callable[[str], Any]
pytestmark = pytest.mark.filterwarnings("default")


@pytest.mark.parametrize("name", ["sd1", "pixart"])
def test_another_schedule_is_exact_after_one_call_and_survives_saving(
    family: Make, name: str, tmp_path: Path
) -> None:
    made = family(name)
    moved = made.sampler(made.quantized)
    moved.pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(moved.pipeline.scheduler.config)
    tfmq.rebake(moved, made.reference, steps=7)
    steps = steps_of(moved.denoiser.module)
    assert len(steps.timesteps) == 7
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*was not calibrated")
        images = moved.run(range(1), steps=7, seed=0)
    disturbed = temporal_disturbance(made.reference, moved.denoiser.module)
    assert disturbed.max_relative_error < 0.01 and disturbed.mismatches == 0
    moved.pipeline.save_pretrained(tmp_path / "moved")
    assert stored_manifest(tmp_path / "moved").provenance.steps == 7
    assert torch.equal(made.sampler(tmp_path / "moved").run(range(1), steps=7, seed=0), images)


def test_grids_follow_the_nearest_calibrated_timestep(family: Make) -> None:
    made = family("sd1")
    moved, before = made.sampler(made.quantized), made.sampler(made.quantized)
    tfmq.rebake(moved.pipeline, made.stock, steps=3)
    timesteps = [steps_of(sampler.denoiser.module).timesteps for sampler in (moved, before)]
    nearest = (timesteps[0][:, None] - timesteps[1]).abs().argmin(dim=1)
    compared = 0
    for name, quantizer in moved.denoiser.module.named_modules():
        if isinstance(quantizer, ActivationQuantizer):
            compared += 1
            assert torch.equal(quantizer.scale, before.denoiser.module.get_submodule(name).scale[nearest])
    assert compared > 50


def test_what_cannot_be_rebaked_is_refused(family: Make, sampler: Callable[..., LoopSampler]) -> None:
    made = family("sd1")
    with pytest.raises(ValueError, match="takes a quantized model and the full-precision"):
        tfmq.rebake(made.stock, made.quantized, steps=3)
    with pytest.raises(ValueError, match="is no temporal feature of the reference"):
        tfmq.rebake(made.quantized, sampler("plain"), steps=3)
