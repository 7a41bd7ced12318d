import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.probe import layer_outputs

MODELS = ["unet", "own_attention", "conditional", "class_conditional", "sdxl", "dit", "sd3", "plain"]


@pytest.mark.parametrize("name", MODELS)
def test_the_replay_is_what_the_model_computes_at_every_timestep(
    build: Callable[..., Any], name: str
) -> None:
    denoiser, example = build(name)
    block = TemporalBlock(denoiser, example, batch=4)
    names = [layer.name for layer in block.trace.temporal]
    batch = example.resized(4)
    timesteps = torch.tensor([0, 3, 500, 999])
    with torch.no_grad(), layer_outputs(denoiser.module, names) as seen:
        denoiser(Inputs(torch.randn_like(batch.sample), timesteps, batch.conditions))
    with torch.no_grad():
        replayed = block.run(block.at(timesteps), names)
    for layer in names:
        torch.testing.assert_close(replayed[layer], seen[layer], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(seen[layer][0], seen[layer][3])


def test_conditions_come_from_the_call_or_else_from_the_example(build: Callable[..., Any]) -> None:
    denoiser, example = build("class_conditional")
    block = TemporalBlock(denoiser, example, batch=2)
    (name, *_) = block.features
    t = torch.tensor([5, 5])
    three, four = ({"class_labels": torch.tensor([label, label])} for label in (3, 4))
    base = example.resized(2)
    runs = [
        block.run(Inputs(base.sample, t, {**base.conditions, **labels}), [name])[name]
        for labels in (three, four)
    ]
    assert torch.equal(block.run(block.at(t), [name])[name], runs[0])
    assert not torch.allclose(runs[0], runs[1])


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_any_number_of_timesteps_gives_a_row_each(build: Callable[..., Any], count: int) -> None:
    denoiser, example = build("unet")
    block = TemporalBlock(denoiser, example, batch=4)
    timesteps = torch.arange(count) * 100
    features = block(timesteps)
    assert tuple(features) == block.cacheable == block.features
    alone = {name: torch.cat([block(t[None])[name] for t in timesteps]) for name in features}
    for name, value in features.items():
        assert value.shape[0] == count
        torch.testing.assert_close(value, alone[name], rtol=1e-5, atol=1e-6)


def test_features_follow_the_layers_that_are_there_now(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    block = TemporalBlock(denoiser, example, batch=2)
    t = torch.tensor([3, 7])
    before = block(t)["stages.0.shift"]
    denoiser.module.stages[0].shift = nn.Sequential(denoiser.module.stages[0].shift, nn.ReLU())
    assert torch.equal(block(t)["stages.0.shift"], before.relu())


def test_of_a_copy_runs_the_copys_layers(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    block = TemporalBlock(denoiser, example, batch=2)
    t = torch.tensor([3, 7])
    other = copy.deepcopy(denoiser.module)
    before = block(t)
    for feature in block.of(other)(t).items():
        assert torch.equal(feature[1], before[feature[0]])
    other.time_embedding.linear_1.weight.mul_(2)
    for name, feature in block.of(other)(t).items():
        assert not torch.allclose(feature, before[name])
        assert torch.equal(block(t)[name], before[name])


def test_the_replay_is_differentiable_in_the_layers(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    block = TemporalBlock(denoiser, example, batch=2)
    weight = denoiser.module.time_embedding.linear_1.weight.requires_grad_()
    sum(
        value.sum() for value in block.run(block.at(torch.tensor([3, 7])), block.features).values()
    ).backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_timesteps_between_integers_are_not_rounded(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    assert example.timestep.dtype == torch.long
    block = TemporalBlock(denoiser, example, batch=2)
    (name, *_) = block.features
    fractional = torch.tensor([500.0, 500.6])
    with torch.no_grad(), layer_outputs(denoiser.module, [name]) as seen:
        denoiser(Inputs(example.resized(2).sample, fractional, {}))
    torch.testing.assert_close(block(fractional)[name], seen[name], rtol=1e-5, atol=1e-6)


class Folded(nn.Module):
    """A video model: the embedding is repeated for each frame before the layer whose output is the
    feature.
    """

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.proj, self.exit = nn.Linear(4, 3), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = torch.sin(t[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03])).repeat_interleave(
            self.frames, dim=0
        )
        return self.exit(x.flatten(0, 1) + self.proj(emb)[:, :, None, None])


def test_frames_share_the_feature_of_their_timestep() -> None:
    block = TemporalBlock(Denoiser(Folded(2)), Inputs(torch.randn(1, 2, 3, 4, 4), torch.tensor([5])), batch=4)
    single = TemporalBlock(
        Denoiser(Folded(1)), Inputs(torch.randn(1, 1, 3, 4, 4), torch.tensor([5])), batch=4
    )
    single.module.load_state_dict(block.module.state_dict())
    assert torch.equal(block(torch.tensor([1, 2]))["proj"], single(torch.tensor([1, 2]))["proj"])


class Tokens(nn.Module):
    """Its feature has an axis of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(1, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x + self.proj(t[:, None, None].expand(-1, 5, 1))


def test_features_that_are_no_rows_of_timesteps_are_refused_by_name() -> None:
    block = TemporalBlock(Denoiser(Tokens()), Inputs(torch.randn(1, 5, 3), torch.tensor([5.0])), batch=4)
    with pytest.raises(ValueError, match=r"proj .*\(4, 5, 3\).* 4 timesteps"):
        block(torch.tensor([1.0, 2.0]))
