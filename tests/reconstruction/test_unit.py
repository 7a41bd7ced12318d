from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.calibration.capture import UnitCalls
from tfmq.calibration.replay import Upstream
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.plan import activation_sites, calibrated_layers, prepare
from tfmq.nn.swap import precision, replace_module
from tfmq.nn.temporal import CachedFeature, FeatureTable
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe, Weights
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, Rounding
from tfmq.reconstruction.unit import (
    Feed,
    UnitReport,
    _FirstErrors,
    _split,
    capture_unit,
    reconstruct_unit,
    settle,
)
from tfmq.reconstruction.units import find_units

TIMESTEPS = torch.tensor([5.0, 300.0, 900.0])
QUICK = Learning(iterations=80, learning_rate=3e-2, batch_size=8)


def prepared(
    denoiser: Denoiser, example: Inputs, *, bits: int = 3, activation_bits: int | None = None
) -> StepContext:
    steps = StepContext(TIMESTEPS)
    recipe = Recipe(
        name="r",
        weights=Weights(bits=bits, ranges="min_max"),
        activations=Activations(bits=activation_bits, products=activation_bits is not None),
    )
    prepare(denoiser.module, make_plan(recipe, trace(denoiser, example)), steps, timestep=denoiser.timestep)
    for site in activation_sites(denoiser.module).values():
        site.fit(torch.full_like(site.scale, 0.05), torch.full_like(site.zero_point, 128))
    return steps


def batches(example: Inputs, *, count: int = 4) -> list[Inputs]:
    grown = example.resized(6)
    timesteps = TIMESTEPS[[0, 0, 1, 1, 2, 2]].long()
    return [Inputs(torch.randn_like(grown.sample), timesteps, grown.conditions) for _ in range(count)]


def reconstruct(
    denoiser: Denoiser,
    name: str,
    data: list[Inputs],
    steps: StepContext,
    *,
    exclude: tuple[str, ...] = (),
    solver: str = "adaround",
) -> UnitReport:
    units = {
        unit.name: unit
        for unit in find_units(denoiser.module, list(calibrated_layers(denoiser.module)), exclude=exclude)
    }
    return reconstruct_unit(
        denoiser,
        units[name],
        Feed(data, Upstream(None), steps),
        Rounding(solver=solver),
        QUICK,
        seed=0,
        advance=lambda amount=1: None,
    )


def whole(calls: UnitCalls) -> UnitCalls:
    return calls.rows(torch.arange(len(calls)))


@pytest.mark.parametrize(
    ("model", "unit"),
    [("plain", "stages.0"), ("unet", "down_blocks.1.resnets.0"), ("unet", "mid_block.attentions.0")],
)
@pytest.mark.parametrize("activation_bits", [None, 8])
# `nearest` is what the others are compared with.
@pytest.mark.parametrize("solver", [name for name in SOLVERS if name != "nearest"])
def test_the_outputs_error_falls_and_is_reported(
    build: Callable[..., Any], model: str, unit: str, activation_bits: int | None, solver: str
) -> None:
    denoiser, example = build(model)
    steps, data = prepared(denoiser, example, activation_bits=activation_bits), batches(example)
    with precision(denoiser.module, weights="full", inputs="full"):
        module = denoiser.module.get_submodule(unit)
        calls = whole(capture_unit(denoiser, module, Feed(data, Upstream(None), steps))[1])
    report = reconstruct(denoiser, unit, data, steps, solver=solver)
    assert report.name == unit and report.error_after < 0.9 * report.error_before and report.seconds > 0
    with torch.no_grad(), steps.at(calls.timestep):
        after = (module(*calls.args, **calls.kwargs) - calls.outputs[0]).square().sum(dim=1).mean()
    assert float(after) == pytest.approx(report.error_after, rel=1e-3)


def test_the_unit_ends_quantized_and_the_rest_as_it_was(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    steps = prepared(denoiser, example, activation_bits=8)
    layers = calibrated_layers(denoiser.module)
    before = {name: layer.codes.clone() for name, layer in layers.items()}
    reconstruct(denoiser, "stages.0", batches(example), steps)
    for name, layer in layers.items():
        inside = name.startswith("stages.0.")
        assert (layer.weight_precision, layer.input_precision) == (
            ("quantized", "quantized") if inside else ("full", "full")
        )
        assert layer.rounding is None and (inside or torch.equal(layer.codes, before[name]))


def test_excluded_temporal_codes_are_untouched_though_their_layer_runs_quantized(
    build: Callable[..., Any],
) -> None:
    denoiser, example = build("unet")
    steps = prepared(denoiser, example)
    layers = calibrated_layers(denoiser.module)
    temporal = tuple(name for name in layers if "time_emb" in name)
    before = {name: layer.codes.clone() for name, layer in layers.items()}
    name = "down_blocks.1.resnets.0"
    reconstruct(denoiser, name, batches(example), steps, exclude=temporal)
    changed = {layer for layer in layers if not torch.equal(layers[layer].codes, before[layer])}
    assert changed and changed <= {f"{name}.conv1", f"{name}.conv2", f"{name}.conv_shortcut"}
    assert layers[f"{name}.time_emb_proj"].weight_precision == "quantized"


def test_inputs_come_from_the_quantized_network_and_targets_from_full_precision(
    build: Callable[..., Any],
) -> None:
    denoiser, example = build("plain")
    unit, data = denoiser.module.stages[1], batches(example)
    seen: list[Tensor] = []

    def watched() -> None:
        handle = unit.register_forward_hook(lambda _, args, out: seen.extend((args[0].clone(), out.clone())))
        denoiser(data[0])
        handle.remove()

    watched()
    steps = prepared(denoiser, example)
    first = denoiser.module.stages[0]
    layers = calibrated_layers(denoiser.module)
    for layer in layers.values():
        layer.weight_precision = "quantized" if layer is first.block else "full"
    table = FeatureTable(3, 8, "int8")
    table.fit(torch.full((3, 8), 100.0))
    replace_module(
        denoiser.module, "stages.1.shift", CachedFeature(unit.shift, table, steps, everywhere=True)
    )
    watched()
    feed = Feed(data[:1], Upstream(None), steps)
    full, calls = map(whole, capture_unit(denoiser, unit, feed))
    stock_input, stock_output, quantized_input, _ = seen
    assert torch.equal(calls.args[0], quantized_input) and not torch.allclose(quantized_input, stock_input)
    torch.testing.assert_close(calls.outputs[0], stock_output)
    torch.testing.assert_close(full.args[0], stock_input)
    alone, same = capture_unit(denoiser, unit, feed, inputs="full")
    assert torch.equal(whole(alone).args[0], full.args[0]) and same is alone


class TwoStreams(nn.Module):
    """Like a joint transformer block: a layer for each of two streams, and both come out."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, text: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        return self.text(text), self.image(image)


class TwoStreamDenoiser(nn.Module):
    """One joint block."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = TwoStreams()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        text, image = self.joint(x[:, :4], x[:, 4:] + t[:, None, None] / 1000)
        return torch.cat([text, image], dim=1)


def test_every_output_of_a_unit_is_reconstructed() -> None:
    # What is learned is the sum of both outputs: of some networks one gains at the cost of the other.
    torch.manual_seed(0)
    denoiser = Denoiser(TwoStreamDenoiser().requires_grad_(False))
    direction = torch.rand(8) + 1
    data = [
        Inputs(torch.randn(6, 9, 1) * direction + 0.1 * torch.randn(6, 9, 8), TIMESTEPS[[0, 0, 1, 1, 2, 2]])
        for _ in range(4)
    ]
    steps = prepared(denoiser, Inputs(data[0].sample[:1], data[0].timestep[:1]))
    layers = calibrated_layers(denoiser.module)
    nearest = {name: layer.codes.clone() for name, layer in layers.items()}
    reconstruct(denoiser, "joint", data, steps)
    for name, layer in layers.items():
        inputs = torch.cat([batch.sample for batch in data]).flatten(0, 1)
        errors = [
            ((inputs @ (layer.grid.decode(codes.float()) - layer.weight).T).square().sum(1).mean())
            for codes in (nearest[name], layer.codes)
        ]
        assert errors[1] < 0.8 * errors[0], name


def test_settling_reaches_layers_and_products_below_the_unit(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    prepared(denoiser, example, activation_bits=8)
    unit = denoiser.module.mid_block.attentions[0]
    assert not unit.tfmq_products.enabled
    settle(unit)
    assert unit.tfmq_products.enabled
    assert {layer.input_precision for layer in calibrated_layers(unit).values()} == {"quantized"}
    assert {layer.weight_precision for layer in calibrated_layers(unit).values()} == {"quantized"}
    outside = {
        layer.weight_precision
        for name, layer in calibrated_layers(denoiser.module).items()
        if not name.startswith("mid_block.attentions.0")
    }
    assert outside == {"full"}


@pytest.mark.parametrize(("count", "share"), [(10, 0.0), (10, 0.25), (7, 0.9), (3, 0.1)])
def test_what_is_held_out_is_spread_and_never_learned_on(count: int, share: float) -> None:
    seen, held_out = _split(count, share)
    assert len(held_out) == int(share * count) and sorted([*seen.tolist(), *held_out.tolist()]) == list(
        range(count)
    )
    if len(held_out) > 1:
        gaps = held_out.diff()
        assert int(gaps.max() - gaps.min()) <= 1


def test_held_out_samples_judge_a_unit(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    steps, data = prepared(denoiser, example), batches(example)
    units = {
        unit.name: unit for unit in find_units(denoiser.module, list(calibrated_layers(denoiser.module)))
    }
    learning, advances = replace(QUICK, iterations=120, learning_rate=2e-2, held_out=0.25), []
    report = reconstruct_unit(
        denoiser,
        units["stages.0"],
        Feed(data, Upstream(None), steps),
        Rounding(),
        learning,
        seed=0,
        advance=lambda amount=1: advances.append(amount),
    )
    assert (
        0 < report.iterations <= learning.iterations
        and sum(advances) == learning.iterations
        and report.error_after < report.error_before
    )


def test_full_precision_inputs_are_kept_for_those_alone_that_run_on_them(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    steps = prepared(denoiser, example)
    feed = Feed(batches(example), Upstream(None), steps)
    full, calls = capture_unit(denoiser, denoiser.module.stages[1], feed, full_inputs=False)
    assert (full.args, full.kwargs) == ((), {}) and len(calls.args) == 2 and full.outputs is calls.outputs


# Solvers that learn read the calls in the same way, and take seconds more.
@pytest.mark.parametrize("solver", [name for name in SOLVERS if not SOLVERS[name].work(QUICK, 0)])
def test_kept_outputs_change_no_code_and_no_error(
    build: Callable[..., Any], tmp_path: Path, solver: str
) -> None:
    """The error before is that of the nearest codes, and that after the same whether it is measured in the
    network or apart.
    """
    found = []
    for directory in (None, tmp_path / "outputs"):
        torch.manual_seed(0)
        denoiser, example = build("unet")
        steps, data = prepared(denoiser, example, activation_bits=8), batches(example)
        layers = calibrated_layers(denoiser.module)
        units = find_units(denoiser.module, list(layers))[:3]
        upstream, reports = Upstream(directory, once={unit.name for unit in units}), []
        for unit in units:
            config = {"seed": 0, "advance": lambda amount=1: None}
            reports.append(
                reconstruct_unit(
                    denoiser, unit, Feed(data, upstream, steps), Rounding(solver=solver), QUICK, **config
                )
            )
            upstream.add(unit.name, denoiser.module.get_submodule(unit.name))
        found.append((reports, {name: layer.codes.clone() for name, layer in layers.items()}))
    (apart, codes), (kept, same) = found
    assert all(torch.equal(value, same[name]) for name, value in codes.items())
    for one, other in zip(apart, kept, strict=True):
        assert one.error_before == pytest.approx(
            other.error_before, rel=1e-5
        ) and one.error_after == pytest.approx(other.error_after, rel=1e-5)
        assert one.error_after <= one.error_before and (
            solver != "nearest" or one.error_after == pytest.approx(one.error_before, rel=1e-5)
        )


def test_the_first_error_of_every_batch_counts() -> None:
    parts = torch.arange(5).split(2)
    first = _FirstErrors(parts)
    for part, error in zip(parts[:2], (1.0, 2.0), strict=True):
        first.see(part, torch.tensor(error))
    assert first.mean() is None
    for part in parts:
        first.see(part, torch.tensor(3.0))
    assert first.mean() == (2 * 1.0 + 2 * 2.0 + 1 * 3.0) / 5
