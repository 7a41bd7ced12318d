"""How errors add up: influences against the samplers' published formulas, sums against what is drawn."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from tfmq.evaluation.analysis.accumulation import Accumulation, accumulated, influence, scheduler_of, walked
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler

STEPS = 6


def of_ddim(scheduler: Any) -> Tensor:
    """Song et al., 2021, equation 12 with eta 0: a step is `a x + b e`, with `a` the ratio of the signals and
    `b` what is left of the noise.
    """
    levels = scheduler.alphas_cumprod.double()
    before = scheduler.timesteps
    after = [*before[1:].tolist(), None]
    final = scheduler.final_alpha_cumprod.double()
    found, factor = [], torch.ones((), dtype=torch.float64)
    for t, s in reversed(list(zip(before.tolist(), after, strict=True))):
        here, there = levels[t], final if s is None else levels[s]
        a = (there / here).sqrt()
        found.append(factor * ((1 - there).sqrt() - a * (1 - here).sqrt()))
        factor = factor * a
    return torch.stack(found[::-1])


def of_euler(scheduler: Any) -> Tensor:
    """Karras et al., 2022, algorithm 1 without churn: a step adds `(sigma' - sigma) e`."""
    return scheduler.sigmas.double().diff()


def of_multistep(scheduler: Any) -> Tensor:
    """Lu et al., 2022, algorithm 2 (DPM-Solver++ 2M), for a prediction of the noise."""
    sigmas = scheduler.sigmas.double()
    alpha = 1 / (1 + sigmas.square()).sqrt()
    noise, half = sigmas * alpha, (alpha / (sigmas * alpha).clamp(min=1e-300)).log()
    count = len(sigmas) - 1
    state, clean = torch.zeros(count, dtype=torch.float64), []
    for i in range(count):
        impulse = torch.eye(count, dtype=torch.float64)[i]
        clean.append((state - noise[i] * impulse) / alpha[i])
        h = half[i + 1] - half[i]
        # The first step is of order one, and so is the last of a few.
        direction = clean[i]
        if 0 < i < count - 1:
            r = (half[i] - half[i - 1]) / h
            direction = (1 + 1 / (2 * r)) * clean[i] - clean[i - 1] / (2 * r)
        state = noise[i + 1] / noise[i] * state - alpha[i + 1] * torch.expm1(-h) * direction
    return state


# diffusers hands tensors to numpy.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize(
    ("scheduler", "formula"),
    [
        (DDIMScheduler(clip_sample=False, set_alpha_to_one=False), of_ddim),
        (EulerDiscreteScheduler(), of_euler),
        (DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", final_sigmas_type="zero"), of_multistep),
    ],
    ids=["ddim", "euler", "dpm-solver++"],
)
def test_the_influence_of_a_step_is_that_of_the_published_formula(
    scheduler: Any, formula: Callable[[Any], Tensor]
) -> None:
    scheduler.set_timesteps(STEPS)
    # Schedulers keep their levels in float32.
    torch.testing.assert_close(influence(scheduler, STEPS), formula(scheduler), rtol=2e-4, atol=1e-6)


class Halving:
    """A sampler's whole contract: timesteps, and what the state is next."""

    def set_timesteps(self, count: int) -> None:
        self.timesteps = torch.arange(count).flip(0)

    def step(self, prediction: Tensor, timestep: Tensor, state: Tensor) -> SimpleNamespace:
        return SimpleNamespace(prev_sample=state / 2 + prediction)


def test_a_scheduler_needs_no_more_than_a_sampler_asks_of_it() -> None:
    torch.testing.assert_close(influence(Halving(), 3), torch.tensor([0.25, 0.5, 1.0]).double())


class Linear(nn.Module):
    """Predicts a multiple of its input, and a constant."""

    def __init__(self, factor: float, constant: float = 0.0) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))
        self.constant = constant

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.factor * sample + self.constant


def compared(reference: LoopSampler, quantized: LoopSampler, count: int) -> Accumulation | None:
    walks = []
    for each in (reference, quantized):
        with walked(each) as walk:
            each.run(range(count), steps=20, seed=0)
        walks.append(walk)
    return accumulated(quantized, tuple(walks), scheduler_of(reference), range(count), steps=20, seed=0)  # type: ignore[arg-type]


def sampler(module: nn.Module, scheduler: Any = None) -> LoopSampler:
    return LoopSampler(Denoiser(module), scheduler or DDIMScheduler(clip_sample=False), shape=(3, 4, 4))


def test_a_scheduler_that_calls_more_often_than_it_steps_adds_up() -> None:
    """PNDM asks twice for the second timestep. It is linear in predictions, so that the sum is exact."""
    reference, shifted = (sampler(Linear(0.0, c), PNDMScheduler(skip_prk_steps=True)) for c in (0.0, 1e-3))
    found = compared(reference, shifted, 2)
    assert found is not None and len(found.timesteps) == 21
    assert found.predicted[-1] == pytest.approx(found.measured, rel=1e-3)


@pytest.mark.parametrize(
    ("factor", "constant", "bias", "gain"),
    [(0.5 * 0.999, 0.0, None, 1.0), (0.5, 1e-3, 1.0, None)],
    ids=["gain", "bias"],
)
def test_what_repeats_is_told_apart_and_adds_up(
    factor: float, constant: float, bias: float | None, gain: float | None
) -> None:
    """A shrunken denoiser errs by a multiple of its prediction, a shifted one by a constant; both the same
    way at every step.
    """
    found = compared(sampler(Linear(0.5)), sampler(Linear(factor, constant)), 8)
    assert found is not None and len(found.timesteps) == 20
    if gain is not None:
        assert all(share == pytest.approx(gain, abs=1e-3) for share in found.gain) and max(found.bias) < 0.2
    if bias is not None:
        assert all(share == pytest.approx(bias, abs=1e-3) for share in found.bias) and max(found.gain) < 0.2
    assert (
        all(value is not None and value > 0.99 for value in found.correlation[1:])
        and found.correlation[0] is None
    )
    # Errors that repeat end far above what independent ones would.
    assert found.predicted[-1] > 2 * found.random[-1]


def test_the_sum_is_what_is_drawn_where_the_denoiser_does_not_answer() -> None:
    found = compared(sampler(Linear(0.0)), sampler(Linear(0.0, 1e-3)), 2)
    assert found is not None and found.predicted[-1] == pytest.approx(found.measured, rel=1e-3)
    assert max(found.gain) == 0 and min(found.bias) == pytest.approx(1.0)


def test_errors_that_have_nothing_in_common_add_up_as_noise(build: Callable[..., Any]) -> None:
    class Noisy(Linear):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            generator = torch.Generator().manual_seed(int(timestep.flatten()[0]))
            return super().forward(sample, timestep) + 1e-3 * torch.randn(sample.shape, generator=generator)

    found = compared(sampler(Linear(0.0)), sampler(Noisy(0.0)), 64)
    assert found is not None and max(abs(value) for value in found.correlation[1:] if value is not None) < 0.1
    assert found.predicted[-1] == pytest.approx(found.random[-1], rel=0.1)
    assert found.predicted[-1] == pytest.approx(found.measured, rel=1e-3), (
        "a denoiser that does not look at the state"
    )


def test_a_sampler_without_a_scheduler_is_not_looked_at() -> None:
    class Own:
        denoiser = Denoiser(Linear(1.0))

    assert scheduler_of(Own()) is None  # type: ignore[arg-type]
    with walked(Own()) as walk:  # type: ignore[arg-type]
        assert walk == []
    assert accumulated(Own(), ([], []), None, range(1), steps=2, seed=0) is None  # type: ignore[arg-type]
