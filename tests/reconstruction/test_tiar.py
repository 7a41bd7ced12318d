from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq.models.denoiser import Inputs
from tfmq.nn.plan import calibrated_layers, prepare
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe, Temporal, Weights
from tfmq.reconstruction import tiar
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, Rounding
from tfmq.reconstruction.tiar import condition_pairs, full_features, reconstruct_temporal
from tfmq.reconstruction.unit import settle
from tfmq.temporal.block import TemporalBlock

TIMESTEPS = torch.linspace(0, 990, 12)
W3 = Recipe(
    name="w3", weights=Weights(bits=3, ranges="min_max"), activations=Activations(bits=None, products=False)
)
QUICK = Learning(iterations=75, learning_rate=4e-2)
# `nearest` is what the others are compared with.
SOLVED = [name for name in SOLVERS if name != "nearest"]


def prepared(build: Callable[..., Any], name: str) -> tuple[TemporalBlock, StepContext, dict[str, Any]]:
    denoiser, example = build(name)
    block = TemporalBlock(denoiser, example, batch=8)
    steps = StepContext(TIMESTEPS)
    prepare(denoiser.module, make_plan(W3, block.trace), steps, timestep=denoiser.timestep)
    return block, steps, calibrated_layers(denoiser.module)


def squared_error(block: TemporalBlock, target: dict[str, Tensor]) -> float:
    with torch.no_grad():
        return float(
            sum(
                (value - target[name]).square().sum(1).mean()
                for name, value in block(TIMESTEPS, block.features).items()
            )
        )


# The larger models take a while: one solver that learns, and one that does not.
@pytest.mark.parametrize(
    ("name", "solver"),
    [*product(["plain"], SOLVED), *product(["unet", "sdxl", "dit"], ["adaround", "gptq"])],
)
def test_feature_errors_fall_below_nearest_and_other_layers_are_left_alone(
    build: Callable[..., Any], name: str, solver: str
) -> None:
    block, steps, layers = prepared(build, name)
    with torch.no_grad():
        target = block(TIMESTEPS, block.features)
    temporal = {layer.name: layers[layer.name] for layer in block.trace.temporal}
    for layer in temporal.values():
        layer.weight_precision = "quantized"
    nearest, before = (
        {name: layer.codes.clone() for name, layer in layers.items()},
        squared_error(block, target),
    )
    assert before > 0
    reconstruct_temporal(
        block,
        temporal,
        steps,
        Temporal(rounding=Rounding(solver=solver), learning=QUICK),
        seed=0,
        advance=lambda amount=1: None,
    )
    assert squared_error(block, target) < (0.9 if solver == "adaround" else 0.3) * before
    changed = {name for name, layer in layers.items() if not torch.equal(layer.codes, nearest[name])}
    assert changed and changed <= set(temporal)


def test_each_timestep_of_a_batch_is_learned_on_its_own_grid(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    block = TemporalBlock(denoiser, example, batch=8)
    steps = StepContext(TIMESTEPS)
    prepare(denoiser.module, make_plan(Recipe(name="r"), block.trace), steps, timestep="t")
    temporal = {
        name: layer
        for name, layer in calibrated_layers(denoiser.module).items()
        if block.trace.layer(name).temporal
    }
    for layer in temporal.values():
        settle(layer)
    seen: list[Tensor] = []
    temporal["embed"].register_forward_pre_hook(
        lambda *_: seen.append(steps.index.clone()) if torch.is_grad_enabled() else None
    )
    reconstruct_temporal(
        block,
        temporal,
        steps,
        Temporal(rounding=Rounding(), learning=Learning(iterations=4)),
        seed=0,
        advance=lambda amount=1: None,
    )
    assert len(seen) == 4 and all(len(index) == 8 and len(index.unique()) == 8 for index in seen), (
        "a random subset of the 12 timesteps"
    )
    assert len(torch.cat(seen).unique()) == 12


def calls(example: Inputs, labels: list[int]) -> list[Inputs]:
    """Calls of two samples each, one a timestep, with labels of their own."""
    grown = example.resized(2)
    return [
        Inputs(
            grown.sample,
            torch.tensor([90 * i, 90 * i]),
            {**grown.conditions, "class_labels": torch.tensor([label, label + 1])},
        )
        for i, label in enumerate(labels)
    ]


def test_conditions_are_taken_in_pairs_with_their_timesteps(
    build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, example = build("class_conditional")
    block = TemporalBlock(denoiser, example, batch=4)
    assert block.conditions == ("class_labels",)
    timesteps, conditions = condition_pairs(block, TIMESTEPS, iter(calls(example, [4, 7])))
    assert timesteps.tolist() == [0, 0, 90, 90] and {
        name: value.tolist() for name, value in conditions.items()
    } == {"class_labels": [4, 5, 7, 8]}
    monkeypatch.setattr(tiar, "MOST_PAIRS", 3)
    timesteps, conditions = condition_pairs(block, TIMESTEPS, iter(calls(example, [4, 7])))
    assert timesteps.tolist() == [0, 90] and conditions["class_labels"].tolist() == [4, 7]


def test_a_block_of_the_timestep_alone_reads_no_calls(build: Callable[..., Any]) -> None:
    block, _, _ = prepared(build, "plain")
    found, conditions = condition_pairs(block, TIMESTEPS, (pytest.fail("read a call") for _ in range(1)))
    assert torch.equal(found, TIMESTEPS) and conditions == {} and block.conditions == ()


@pytest.mark.parametrize("solver", SOLVED)
def test_features_are_learned_on_the_classes_of_the_calibration(
    build: Callable[..., Any], solver: str
) -> None:
    block, steps, layers = prepared(build, "class_conditional")
    temporal = {layer.name: layers[layer.name] for layer in block.trace.temporal}
    batches = calls(block.example, [4, 7, 1, 8])
    names, timesteps = block.features, torch.tensor([0, 90, 180, 270])
    labels = {"class_labels": torch.tensor([4, 7, 1, 8])}

    def features() -> dict[str, Tensor]:
        with torch.no_grad():
            return {name: value[:4] for name, value in block.run(block.at(timesteps, labels), names).items()}

    target = features()
    for layer in temporal.values():
        layer.weight_precision = "quantized"

    def error() -> float:
        return float(sum((value - target[name]).square().sum() for name, value in features().items()))

    before = error()
    reconstruct_temporal(
        block,
        temporal,
        steps,
        Temporal(rounding=Rounding(solver=solver), learning=QUICK),
        batches=batches,
        seed=0,
        advance=lambda amount=1: None,
    )
    assert error() < 0.8 * before


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
            return float(
                sum((value - target[name]).square().sum() for name, value in block(steps.timesteps).items())
            )

    before = error()
    reconstruct_temporal(
        block,
        temporal,
        steps,
        Temporal(rounding=Rounding(), learning=QUICK),
        seed=0,
        advance=lambda amount=1: None,
    )
    assert error() <= before
