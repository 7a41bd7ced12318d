"""Corrections fitted to planted errors, which have to be found, or left alone."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.correction import NONE, Fitting, StepFit, explained, recorded_predictions
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import Guidance, LoopSampler
from tfmq.nn.correction import Correction, attach_correction
from tfmq.nn.swap import attach_steps, steps_of
from tfmq.numerics.estimators import ESTIMATORS
from tfmq.quantizers.steps import StepContext

IMAGES, STEPS = 8, 4
ALL = tuple(ESTIMATORS)
Error = Callable[[Tensor, int], Tensor]


class Smooth(nn.Module):
    """A denoiser that anybody can follow: a fixed mixture of the channels of its input, by the timestep and a
    label.
    """

    def __init__(self, error: Error | None = None) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.tensor([[0.6, 0.2], [-0.1, 0.7]]))
        self.error = error

    def forward(self, x: Tensor, t: Tensor, level: Tensor | None = None) -> Tensor:
        found = torch.einsum("oc,bchw->bohw", self.mix, x) * (1 + t[:, None, None, None] / 1000)
        found = found if level is None else found + level[:, None, None, None]
        return found if self.error is None else self.error(found, int(t[0]))


def sampler_of(
    error: Error | None, guidance: Guidance | None = None, conditions: Mapping[str, Any] | None = None
) -> LoopSampler:
    from diffusers import FlowMatchEulerDiscreteScheduler

    # It does not blow up an error of a prediction, as the first steps of DDIM do.
    scheduler = FlowMatchEulerDiscreteScheduler()
    return LoopSampler(
        Denoiser(Smooth(error)),
        scheduler,
        shape=(2, 8, 8),
        guidance=guidance,
        conditions=conditions,
        to_images=torch.clone,
    )


def fitted(
    error: Error, estimators: tuple[str, ...] = ALL, **guided: Any
) -> tuple[Correction, dict[int, StepFit], LoopSampler, LoopSampler]:
    full, wrong = sampler_of(None, **guided), sampler_of(error, **guided)
    full.scheduler.set_timesteps(STEPS)
    steps = StepContext(full.scheduler.timesteps)
    attach_steps(wrong.denoiser.module, steps, timestep="t")
    correction = Correction(steps, channels=2, axis=1)
    with recorded_predictions(full.denoiser.module) as expected:
        full.run(range(IMAGES), steps=STEPS, seed=1)
    fitting = Fitting(wrong.denoiser, correction, expected, estimators=estimators, images=IMAGES)
    with fitting.running():
        wrong.run(range(IMAGES), steps=STEPS, seed=1)
    return correction, fitting.fits, full, wrong


def gain_at(timestep: int) -> Tensor:
    return torch.tensor([1.1 + timestep / 5000, 1.2])[:, None, None]


def planted(prediction: Tensor, timestep: int) -> Tensor:
    return gain_at(timestep) * prediction + 0.1


@pytest.mark.parametrize(
    "guided",
    [
        {},
        {
            "guidance": Guidance(unconditional={"level": torch.tensor([0.1])}, scale=2.0),
            "conditions": {"level": torch.tensor([0.4])},
        },
    ],
    ids=["plain", "guided"],
)
@pytest.mark.parametrize("name", ["gain", "affine"])
def test_a_planted_gain_and_bias_are_found_and_the_images_are_full_precisions(
    name: str, guided: dict[str, Any]
) -> None:
    correction, fits, full, wrong = fitted(planted, (name,), **guided)
    expected = torch.stack([1 / gain_at(int(t)).flatten() for t in steps_of(wrong.denoiser.module).timesteps])
    torch.testing.assert_close(correction.gain, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(correction.bias, -0.1 * expected, rtol=1e-4, atol=1e-5)
    assert {fit.kept for fit in fits.values()} == {name} and all(
        explained(fit.before, fit.after) > 0.999 for fit in fits.values()
    )
    attach_correction(wrong.denoiser.module, correction)
    for seed in (1, 2):
        images = (each.run(range(2), steps=STEPS, seed=seed) for each in (full, wrong))
        torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


def test_the_simplest_estimator_of_equal_ones_is_kept() -> None:
    _, fits, _, _ = fitted(lambda prediction, _: prediction + 0.3)
    assert {fit.kept for fit in fits.values()} == {"bias"}


def test_noise_of_its_own_is_left_alone() -> None:
    """A hundredth of the power is nothing that a gain or a bias can take away. Least squares would shrink
    what it has done to the state.
    """
    noise = torch.Generator().manual_seed(5)

    def noisy(prediction: Tensor, _: int) -> Tensor:
        return prediction + 0.1 * prediction.std() * torch.randn(prediction.shape, generator=noise)

    correction, fits, _, _ = fitted(noisy, ("bias", "gain"))
    assert {fit.kept for fit in fits.values()} == {NONE}
    assert bool((correction.gain == 1).all()) and bool((correction.bias == 0).all())


def test_what_an_earlier_step_has_mended_is_not_mended_again() -> None:
    """An error at the first step alone; without the recurrence its trace in the state would be taken for
    errors of later steps.
    """
    _, fits, _, wrong = fitted(lambda prediction, timestep: prediction * (1.3 if timestep > 700 else 1.0))
    first = len(steps_of(wrong.denoiser.module).timesteps) - 1
    last = {step: fit for step, fit in fits.items() if step != first}
    assert fits[first].kept != NONE
    assert max(fit.before for fit in last.values()) < 1e-6 * fits[first].before


def test_channels_of_a_variance_stay_as_they_are() -> None:
    steps = StepContext(torch.tensor([0.0, 10.0]))
    correction = Correction(steps, channels=2, axis=1)
    correction.gain.fill_(3.0)
    values = torch.randn(4, 5, 2, 2)
    with steps.at_bins(torch.tensor([1])):
        found = correction(values)
    assert torch.equal(found[:, 2:], values[:, 2:]) and torch.equal(found[:, :2], 3 * values[:, :2])


def test_each_sample_has_the_row_of_its_own_step_frames_included() -> None:
    steps = StepContext(torch.tensor([0.0, 10.0]))
    correction = Correction(steps, channels=1, axis=-1)
    correction.bias.copy_(torch.tensor([[1.0], [2.0]]))
    with steps.at_bins(torch.tensor([1, 0])):
        assert correction(torch.zeros(4, 3, 1))[:, 0, 0].tolist() == [2.0, 2.0, 1.0, 1.0]
