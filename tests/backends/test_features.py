"""Temporal features of compiled models: from tables, or from the layers behind them and from no others."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

import tfmq
from tfmq.backends.features import TemporalFeatures
from tfmq.export.capture import Call, Graph
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import entered_steps
from tfmq.nn.temporal import tabulated
from tfmq.recipes.recipe import Calibration
from tfmq.temporal.probe import layer_outputs

pytestmark = pytest.mark.filterwarnings("ignore:.*was not calibrated")
# From a calibrated timestep to one that no table knows.
UNSEEN = 30


class Video(nn.Module):
    """Repeats the embedding of a video's timestep for each of its frames, which are rows of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Linear(2, 4)
        self.entry, self.exit = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep[:, None] / 100
        time = self.time(
            torch.cat([phase.sin(), phase.cos()], dim=1).repeat_interleave(sample.shape[2], dim=0)
        )
        rows = self.entry(sample.transpose(1, 2).flatten(0, 1)) + time[:, :, None, None]
        return self.exit(rows.relu()).unflatten(0, (len(sample), -1)).transpose(1, 2)


def quantized(sampler: Callable[..., LoopSampler], name: str) -> tuple[nn.Module, Inputs]:
    """Return a denoiser with tables and a batch of three whose first timestep is calibrated."""
    if name == "video":
        torch.manual_seed(0)
        made = LoopSampler(Denoiser(Video()), DDIMScheduler(), shape=(2, 3, 8, 8))
        made.to_images = nn.Identity()
    else:
        made = sampler(name)
    recipe = replace(tfmq.scheme("quick_w8a8"), calibration=Calibration(samples=2, steps=2, interval=1))
    tfmq.quantize(made, recipe)
    module, example = made.denoiser.module, made.example().resized(3)
    known = module.tfmq_steps.timesteps[0].long()
    sample = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
    return module, replace(example, sample=sample, timestep=known + torch.tensor([0, UNSEEN, 2 * UNSEEN]))


def features(source: TemporalFeatures, module: nn.Module, inputs: Inputs) -> Tensor:
    """Return the features of a call, as an executor asks for them."""
    arguments = Denoiser(module).arguments(inputs)
    with torch.no_grad(), entered_steps(module, arguments):
        return source.of(module, Call.of(module, arguments))


@pytest.mark.parametrize("name", ["unet", "conditional", "sdxl", "plain", "video"])
@torch.no_grad()
def test_the_denoiser_with_its_features_is_what_it_is_layer_by_layer(
    sampler: Callable[..., LoopSampler], name: str
) -> None:
    module, inputs = quantized(sampler, name)
    found = features(TemporalFeatures(module), module, inputs)
    call = Call.of(module, Denoiser(module).arguments(inputs))
    bins = module.tfmq_steps.lookup(inputs.timestep)[0]
    expected = Denoiser(module)(inputs)
    torch.testing.assert_close(
        Graph(module, call.signature)(bins, found, *call.tensors)[0], expected, rtol=0, atol=1e-5
    )
    rows = tabulated(module, bins)
    assert torch.equal(found[0], rows[0]), "the table knows the first timestep"
    assert not torch.equal(found[1], rows[1]) and not torch.equal(found[1], found[2])


def test_no_other_layer_runs_and_none_twice_for_one_timestep(sampler: Callable[..., LoopSampler]) -> None:
    module, inputs = quantized(sampler, "plain")
    source, packed = TemporalFeatures(module), list(packed_layers(module))
    # The traced call runs every layer, on tensors without values; the skip has a grid for each part.
    with layer_outputs(module, packed) as ran:
        first = features(source, module, inputs.rows(1, 3))
    assert len(packed_layers(module)["exit"].segments) == 2
    assert isinstance(ran["entry"], FakeTensor) and isinstance(ran["exit"], FakeTensor)
    with layer_outputs(module, packed) as ran:
        again = features(source, module, inputs.rows(1, 3))
    assert torch.equal(first, again) and not ran
    with layer_outputs(module, packed) as ran:
        other = features(source, module, replace(inputs, timestep=inputs.timestep + 7).rows(0, 2))
    assert not torch.equal(other[1], first[0])
    assert {name.removesuffix(".block") for name in ran} == {"embed", "stages.0.shift", "stages.1.shift"}
