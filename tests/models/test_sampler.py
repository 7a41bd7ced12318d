import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import Guidance, LoopSampler, image_generator


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
            sample = scheduler.step(
                drawn.denoiser.module(sample, timestep).sample, timestep, sample
            ).prev_sample
    torch.testing.assert_close(drawn.run(range(1), steps=4, seed=3), (sample / 2 + 0.5).clamp(0, 1))


def test_the_denoiser_sees_the_schedule_once_per_sample_and_the_conditions(
    sampler: Callable[..., LoopSampler],
) -> None:
    drawn = sampler("class_conditional")
    seen: list[tuple[list[int], Any]] = []
    handle = drawn.denoiser.module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((kwargs["timestep"].tolist(), kwargs["class_labels"].tolist())),
        with_kwargs=True,
    )
    drawn.run(range(2), steps=2, seed=0)
    handle.remove()
    assert seen == [([500, 500], [3, 3]), ([0, 0], [3, 3])]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_schedulers_that_scale_the_input_and_step_between_timesteps_work(
    sampler: Callable[..., LoopSampler],
) -> None:
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


class Labelled(nn.Module):
    """Has a label a sample, an argument without a batch axis, and notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.mix = nn.Conv2d(4, 4, 3, padding=1)
        self.calls: list[tuple[list[int], list[float]]] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor, places: Tensor | None = None) -> Tensor:
        self.calls.append((y.tolist(), t.tolist()))
        hidden = x + self.embedding(y)[:, :, None, None] * (t[:, None, None, None] / 1000)
        return self.mix(hidden if places is None else hidden + places.mean())


def labelled(**settings: Any) -> LoopSampler:
    from diffusers import DDIMScheduler

    torch.manual_seed(0)
    return LoopSampler(Denoiser(Labelled().eval()), DDIMScheduler(), shape=(4, 8, 8), **settings)


LABELS = {"y": torch.tensor([0, 1, 2])}
NONE = {"y": torch.tensor([4])}


def test_images_have_conditions_in_turn_whatever_batch_they_are_drawn_in() -> None:
    drawn = labelled(per_image=LABELS)
    together = drawn.run(range(1, 5), steps=2, seed=0)
    assert [labels for labels, _ in drawn.denoiser.module.calls] == [[1, 2, 0, 1]] * 2
    for index in range(1, 5):
        torch.testing.assert_close(
            drawn.run(range(index, index + 1), steps=2, seed=0)[0], together[index - 1], atol=1e-5, rtol=0
        )
    assert drawn.example().conditions["y"].tolist() == [0]


@pytest.mark.parametrize("calls", [1, 2])
def test_guidance_is_the_formula_in_one_call_or_two(calls: int) -> None:
    drawn = labelled(
        per_image=LABELS,
        conditions={"places": torch.ones(3, 2)},
        guidance=Guidance(unconditional=NONE, scale=3.0, calls=calls),
    )
    images = drawn.run(range(2), steps=2, seed=1)
    seen = [labels for labels, _ in drawn.denoiser.module.calls]
    assert seen == ([[4, 4, 0, 1]] * 2 if calls == 1 else [[4, 4], [0, 1]] * 2)
    scheduler, module = drawn.scheduler, drawn.denoiser.module
    sample = torch.stack([torch.randn(4, 8, 8, generator=image_generator(1, index)) for index in range(2)])
    scheduler.set_timesteps(2)
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            t, places = timestep.expand(2), torch.ones(3, 2)
            without, towards = (
                module(sample, t, torch.tensor([4, 4]), places),
                module(sample, t, torch.tensor([0, 1]), places),
            )
            sample = scheduler.step(without + 3.0 * (towards - without), timestep, sample).prev_sample
    torch.testing.assert_close(images, (sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_images_are_what_the_map_makes_of_the_final_sample() -> None:
    drawn = labelled(per_image=LABELS, to_images=lambda sample: sample[:, :3].sigmoid())
    images = drawn.run(range(2), steps=2, seed=0)
    assert images.shape == (2, 3, 8, 8) and images.min() > 0 and images.max() < 1
    assert not torch.equal(images, labelled(per_image=LABELS).run(range(2), steps=2, seed=0)[:, :3])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"per_image": {"y": torch.tensor([0, 1]), "places": torch.zeros(3, 1)}}, "y has 2, places has 3"),
        ({"per_image": {"y": torch.zeros(0, dtype=torch.long)}}, "y has 0"),
        ({"per_image": {"y": torch.tensor(1)}}, "y has 0"),
        ({"per_image": LABELS, "conditions": NONE}, "leave it out of one"),
        (
            {
                "per_image": LABELS,
                "guidance": Guidance(unconditional={"places": torch.ones(1, 2)}, scale=2.0),
            },
            "use two calls",
        ),
        (
            {
                "per_image": LABELS,
                "conditions": {"places": torch.ones(3, 2)},
                "guidance": Guidance(unconditional={"places": torch.ones(3, 1)}, scale=2),
            },
            "places but once",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        labelled(**settings)


def test_guidance_takes_one_call_or_two() -> None:
    with pytest.raises(ValueError, match="1 or 2 calls, not 3"):
        Guidance(unconditional={}, scale=1.0, calls=3)


def test_what_images_depend_on_is_described() -> None:
    guided = {"guidance": Guidance(unconditional=NONE, scale=2.0)}
    different = [
        {"per_image": LABELS},
        {"per_image": {"y": torch.tensor([0, 1, 3])}},
        {"conditions": {"y": torch.tensor([1])}},
        {"per_image": LABELS, "conditions": {"flag": True}},
        {"per_image": LABELS, "conditions": {"flag": False}},
        {"per_image": LABELS, **guided},
        {"per_image": LABELS, "guidance": Guidance(unconditional=NONE, scale=2.0, calls=2)},
        {"per_image": LABELS, "guidance": Guidance(unconditional=NONE, scale=3.0)},
        {"per_image": LABELS, "guidance": Guidance(unconditional={"y": torch.tensor([3])}, scale=2.0)},
        {"per_image": LABELS, "to_images": torch.sigmoid},
        {"per_image": LABELS, "to_images": nn.Conv2d(4, 3, 1)},
        {"per_image": LABELS, "to_images": nn.Conv2d(4, 3, 1).forward},
    ]
    described = [labelled(**settings).describe() for settings in different]
    assert all(left != right for number, left in enumerate(described) for right in described[:number])
    assert json.loads(json.dumps(described)) == described
    assert labelled(per_image=LABELS).describe() == described[0]
