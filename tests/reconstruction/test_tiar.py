from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.nn.plan import calibrated_layers, prepare
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe, Weights
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.tiar import full_features, reconstruct_temporal
from tfmq.temporal.block import TemporalBlock

TIMESTEPS = torch.linspace(0, 990, 12)
W3 = Recipe(name="w3", weights=Weights(bits=3, ranges="min_max"), activations=Activations(bits=None, products=False))
QUICK = Learning(iterations=150, learning_rate=2e-2)


def prepared(build: Callable[..., Any], name: str) -> tuple[TemporalBlock, StepContext, dict[str, Any]]:
    denoiser, example = build(name)
    block = TemporalBlock(denoiser, example, batch=8)
    steps = StepContext(TIMESTEPS)
    prepare(denoiser.module, make_plan(W3, block.trace), steps, timestep=denoiser.timestep)
    return block, steps, calibrated_layers(denoiser.module)


def squared_error(block: TemporalBlock, target: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(sum((value - target[name]).square().sum(1).mean() for name, value in block(TIMESTEPS, block.features).items()))


@pytest.mark.parametrize("name", ["unet", "sdxl", "dit", "plain"])
def test_feature_errors_fall_below_nearest_and_other_layers_are_left_alone(build: Callable[..., Any], name: str) -> None:
    block, steps, layers = prepared(build, name)
    with torch.no_grad():
        target = block(TIMESTEPS, block.features)
    temporal = {layer.name: layers[layer.name] for layer in block.trace.temporal}
    for layer in temporal.values():
        layer.weight_precision = "quantized"
    nearest, before = {name: layer.codes.clone() for name, layer in layers.items()}, squared_error(block, target)
    assert before > 0
    reconstruct_temporal(block, temporal, steps, QUICK, seed=0, advance=lambda amount=1: None)
    assert squared_error(block, target) < 0.9 * before
    changed = {name for name, layer in layers.items() if not torch.equal(layer.codes, nearest[name])}
    assert changed and changed <= set(temporal)


def test_full_features_ignore_what_is_quantized(build: Callable[..., Any]) -> None:
    block, _, layers = prepared(build, "unet")
    stock = full_features(block, TIMESTEPS)
    for layer in layers.values():
        layer.weight_precision = "quantized"
    again = full_features(block, TIMESTEPS)
    assert set(stock) == set(block.cacheable)
    for name, feature in stock.items():
        assert torch.equal(again[name], feature)
    assert all(layer.weight_precision == "quantized" for layer in layers.values())


def test_a_schedule_of_one_step_is_learned_too(build: Callable[..., Any]) -> None:
    block, _, layers = prepared(build, "plain")
    steps = StepContext(torch.tensor([500.0]))
    temporal = {layer.name: layers[layer.name] for layer in block.trace.temporal}
    for layer in temporal.values():
        layer.weight_precision = "quantized"
    target = full_features(block, steps.timesteps)

    def error() -> float:
        with torch.no_grad():
            return float(sum((value - target[name]).square().sum() for name, value in block(steps.timesteps).items()))

    before = error()
    reconstruct_temporal(block, temporal, steps, QUICK, seed=0, advance=lambda amount=1: None)
    assert error() <= before
