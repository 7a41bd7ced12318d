"""How far a trajectory strays: nowhere for the same model, by a known amount for a known change."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from tfmq.evaluation.deviation import Walk, deviation, follow, in_words, latent_error, summarized
from tfmq.evaluation.sampling import SamplingError, draw
from tfmq.models.sampler import LoopSampler

Make = Callable[..., LoopSampler]


def walk(states: list[torch.Tensor], count: int = 2) -> Walk:
    return Walk(np.zeros((count, 2, 2, 3), dtype=np.uint8), torch.arange(len(states)).float(), tuple(states))


def test_the_images_and_states_are_those_of_the_run(sampler: Make) -> None:
    made = sampler()
    walked = follow(made, range(2, 4), steps=3, seed=1)
    assert np.array_equal(walked.images, draw(sampler(), 4, steps=3, seed=1, batch_size=2)[2:])
    assert walked.timesteps.tolist() == made.scheduler.timesteps.tolist() and [
        len(state) for state in walked.states
    ] == [2, 2, 2]
    assert not made.denoiser.module._forward_pre_hooks


def test_a_model_does_not_stray_from_itself_and_another_does(sampler: Make) -> None:
    walked, again = (follow(sampler(), range(3), steps=3, seed=1) for _ in range(2))
    assert not deviation(walked, again).any()
    other = deviation(walked, follow(sampler(seed=1), range(3), steps=3, seed=1))
    # The noise is the same; what the model makes of it is not.
    assert other.shape == (3, 3) and not other[0].any() and (other[1:] > 0).all()


def test_the_error_is_relative_to_each_image() -> None:
    state = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    moved = state + torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    assert deviation(walk([state]), walk([moved])).tolist() == [pytest.approx([0.2, 0.02])]


def test_rows_of_guidance_belong_to_their_image() -> None:
    """With guidance the batch is (a, b, a, b)."""
    state = torch.tensor([[1.0], [2.0], [1.0], [2.0]])
    moved = torch.tensor([[1.5], [2.0], [1.5], [2.0]])
    assert deviation(walk([state]), walk([moved])).tolist() == [[0.5, 0.0]]


def test_another_schedule_is_refused() -> None:
    state = torch.ones(2, 1)
    with pytest.raises(ValueError, match="1 and 2 calls"):
        deviation(walk([state]), walk([state, state]))


def test_summary() -> None:
    found = summarized(torch.tensor([9.0, 1.0]), torch.tensor([[0.0, 0.0], [0.2, 0.4]]))
    assert (
        found.timesteps == (9.0, 1.0)
        and found.mean == pytest.approx((0, 0.3))
        and found.worst == pytest.approx((0, 0.4))
    )
    assert found.values()["latent_error"] is None


def test_a_broken_model_is_named_and_left_without_hooks(
    sampler: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = sampler()

    def broken(*_: Any, **__: Any) -> torch.Tensor:
        return torch.full((1, 3, 2, 2), float("nan"))

    monkeypatch.setattr(made, "run", broken)
    with pytest.raises(SamplingError, match="image 5"):
        follow(made, range(5, 6), steps=1, seed=0)
    assert not made.denoiser.module._forward_pre_hooks


def test_the_latent_error_is_that_of_what_is_decoded() -> None:
    latent = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    reference, other = (
        replace(walk([latent]), latent=value) for value in (latent, latent + torch.tensor([0.0, 1.0]))
    )
    found = latent_error(reference, other)
    assert found is not None and found.tolist() == pytest.approx([0.2, 0.02])
    assert latent_error(reference, walk([latent])) is None
    values = summarized(reference.timesteps, deviation(reference, other), found).values()
    assert values["latent_error"] == {"mean": pytest.approx(0.11), "worst": pytest.approx(0.2)}
    assert [name for name, _ in in_words(values)] == ["trajectory", "latent error"]
