from collections.abc import Callable
from typing import Any

import pytest
import torch

from tfmq.calibration.trajectory import CalibrationError, check_finite, recorded_calls
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler


def hooks(module: torch.nn.Module) -> int:
    return sum(len(child._forward_hooks) + len(child._forward_pre_hooks) for child in module.modules())


def test_every_call_of_a_sampler_is_recorded_in_order(sampler: Callable[..., LoopSampler]) -> None:
    drawn, calls = sampler("conditional"), []
    with recorded_calls(drawn.denoiser, calls.append):
        images = drawn.run(range(2), steps=3, seed=0)
    assert [inputs.timestep.tolist() for inputs in calls] == [[666, 666], [333, 333], [0, 0]]
    assert all(
        inputs.sample.shape == (2, 4, 8, 8) and set(inputs.conditions) == {"encoder_hidden_states"}
        for inputs in calls
    )
    assert torch.equal(images, drawn.run(range(2), steps=3, seed=0)), "recording changes nothing"
    assert len(calls) == 3 and hooks(drawn.denoiser.module) == 0


def test_what_is_recorded_replays_and_does_not_follow_the_tensors(build: Callable[..., Any]) -> None:
    denoiser, _ = build("plain")
    calls: list[Inputs] = []
    x, t = torch.randn(2, 2, 8, 8), torch.tensor([3, 5])
    with recorded_calls(denoiser, calls.append):
        out = denoiser.module(x, t=t)
    x.zero_()
    assert torch.equal(denoiser(calls[0]), out)


def test_hooks_go_when_the_call_fails(build: Callable[..., Any]) -> None:
    denoiser, _ = build("plain")
    with pytest.raises(RuntimeError), recorded_calls(denoiser, lambda inputs: None):
        denoiser.module(torch.zeros(1, 99, 8, 8), torch.tensor([3]))
    assert hooks(denoiser.module) == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_that_is_not_finite_names_its_own_timestep(build: Callable[..., Any], bad: float) -> None:
    denoiser, _ = build("plain")
    sample = torch.randn(3, 2, 8, 8)
    sample[1, 0, 2, 2] = bad
    calls: list[Inputs] = []
    with pytest.raises(CalibrationError, match=r"timestep 412:"), recorded_calls(denoiser, calls.append):
        denoiser.module(sample, torch.tensor([7, 412, 900]))
    assert calls == [] and hooks(denoiser.module) == 0
    with pytest.raises(CalibrationError, match=r"timestep 412:"):
        check_finite(Inputs(sample, torch.tensor([7, 412, 900])))
    check_finite(Inputs(sample[:1], torch.tensor([7])))


@pytest.mark.parametrize(
    "name",
    ["time_embedding.linear_1", "down_blocks.1.resnets.0.conv2", "mid_block.attentions.0.to_k", "conv_out"],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_broken_layer_is_named_with_the_first_timestep(
    sampler: Callable[..., LoopSampler], name: str, steps: int
) -> None:
    drawn = sampler("unet")
    drawn.denoiser.module.get_submodule(name).weight[0, 0] = torch.nan
    first = {1: 0, 3: 666}[steps]
    message = rf"{name.replace('.', '[.]')} .*timestep {first}\b"
    with pytest.raises(CalibrationError, match=message), recorded_calls(drawn.denoiser, lambda inputs: None):
        drawn.run(range(2), steps=steps, seed=0)
    assert hooks(drawn.denoiser.module) == 0


def test_an_output_that_no_layer_broke_names_the_denoiser() -> None:
    from tfmq.models.denoiser import Denoiser

    class Dividing(torch.nn.Module):
        """Divides by zero in its own forward."""

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x / (x - x)

    denoiser = Denoiser(Dividing())
    with (
        pytest.raises(CalibrationError, match=r"Dividing .*timestep 4\b"),
        recorded_calls(denoiser, lambda inputs: None),
    ):
        denoiser.module(torch.ones(1, 2), torch.tensor([4]))
