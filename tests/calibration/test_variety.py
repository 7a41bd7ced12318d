"""A condition with finitely many values that calibration saw one of is named, whatever it is called and
however guidance calls the model.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.models.sampler import Guidance, LoopSampler
from tfmq.recipes.recipe import Calibration

RECIPE = replace(
    tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=3, steps=2, interval=1, batch_size=2)
)


class Classes(nn.Module):
    """Conditioned on `kind`, which no other model calls so; `rank` reaches no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.shift = nn.Embedding(6, 8), nn.Linear(8, 8)
        self.entry, self.exit = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, kind: Tensor, rank: Tensor | None = None) -> Tensor:
        shift = self.shift(self.embedding(kind) + t[:, None] / 1000)
        return self.exit(torch.relu(self.entry(x) + shift[:, :, None, None]))


def said(**settings: Any) -> list[str]:
    from diffusers import DDIMScheduler

    sampler = LoopSampler(tfmq.Denoiser(Classes()), DDIMScheduler(), shape=(3, 8, 8), **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tfmq.quantize(sampler, RECIPE)
    return [str(warning.message) for warning in caught if "the calibration saw one" in str(warning.message)]


@pytest.mark.parametrize("calls", [None, 1, 2])
def test_one_class_alone_is_warned_about(calls: int | None) -> None:
    guidance = (
        None if calls is None else Guidance(unconditional={"kind": torch.tensor([5])}, scale=2.0, calls=calls)
    )
    (message,) = said(conditions={"kind": torch.tensor([3]), "rank": torch.tensor([1])}, guidance=guidance)
    assert "one kind alone" in message and "3" in message and "per_image" in message


@pytest.mark.parametrize("calls", [None, 1, 2])
@pytest.mark.parametrize("kinds", [[3, 4], [3, 3, 4]])
def test_two_classes_are_not_be_they_in_one_batch_or_in_two(calls: int | None, kinds: list[int]) -> None:
    guidance = (
        None if calls is None else Guidance(unconditional={"kind": torch.tensor([5])}, scale=2.0, calls=calls)
    )
    assert said(per_image={"kind": torch.tensor(kinds)}, guidance=guidance) == []


@pytest.mark.parametrize(("labels", "warned"), [((3,), True), ((3, 4), False), ((), False)])
def test_pipelines_are_warned_about_too(
    build: Callable[..., Any], labels: tuple[int, ...], warned: bool
) -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    vae = AutoencoderKL(
        block_out_channels=(4,),
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        norm_num_groups=2,
        latent_channels=4,
    )
    pipeline = DiTPipeline(transformer=build("dit")[0].module, vae=vae, scheduler=DDIMScheduler())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Ten classes, and one that stands for none of them: guidance is left out.
        tfmq.quantize(tfmq.PipelineSampler(pipeline, labels=labels, options={"guidance_scale": 1.0}), RECIPE)
    assert any("one class_labels alone, 3" in str(warning.message) for warning in caught) is warned
