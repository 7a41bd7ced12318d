"""The parts of an analysis against what the models themselves compute."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import tfmq
from tfmq.evaluation.analysis.analyze import QUICK, Analysis, Extent, analyze, expected_seconds
from tfmq.evaluation.analysis.layers import layer_errors
from tfmq.evaluation.analysis.ranges import temporal_ranges
from tfmq.evaluation.analysis.sensitivity import TEMPORAL, LayerGroup, borrowed, sensitivity
from tfmq.models.denoiser import Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.numerics.errors import relative_error
from tfmq.recipes.recipe import Activations, Calibration
from tfmq.temporal.block import TemporalBlock

Make = Callable[..., LoopSampler]


@pytest.fixture(scope="module")
def twins(request: pytest.FixtureRequest) -> Callable[..., tuple[LoopSampler, LoopSampler]]:
    """Return a function that gives a tiny model and its quantized twin, without attention products, made
    once.
    """
    sampler = request.getfixturevalue("sampler")
    made: dict[str, tuple[LoopSampler, LoopSampler]] = {}

    def make(scheme: str = "rtn_w4a8") -> tuple[LoopSampler, LoopSampler]:
        if scheme not in made:
            recipe = tfmq.scheme(scheme)
            recipe = replace(
                recipe,
                activations=replace(recipe.activations, products=False),
                calibration=Calibration(samples=2, steps=4, interval=2),
            )
            recipe = replace(recipe, rounding=replace(recipe.rounding, solver="nearest"))
            recipe = replace(
                recipe,
                temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=2)),
            )
            made[scheme] = sampler(), sampler()
            tfmq.quantize(made[scheme][1], recipe)
        return made[scheme]

    return make


@pytest.fixture(scope="module")
def analysed(twins: Callable[..., tuple[LoopSampler, LoopSampler]]) -> Callable[[str], Analysis]:
    """Return a function that gives the whole analysis of the twins on one image, made once."""
    return cache(lambda scheme: analyze(*twins(scheme), extent=Extent(num_images=1), steps=4))


def calls_of(sampler: LoopSampler) -> list[Inputs]:
    example = sampler.example().resized(2)
    noise = torch.randn(example.sample.shape, generator=torch.Generator().manual_seed(0))
    return [
        Inputs(noise * scale, torch.full((2,), timestep), example.conditions)
        for scale, timestep in ((1.0, 750), (0.5, 250))
    ]


def test_ranges_are_those_of_the_running_model(sampler: Make) -> None:
    made = sampler()
    timesteps = torch.tensor([0.0, 250.0, 750.0])
    block = TemporalBlock(made.denoiser, made.example(), batch=2)
    found = temporal_ranges(block, timesteps)
    names = {layer.name for layer in block.trace.temporal}
    assert found.inputs.low.keys() == found.outputs.high.keys() == names
    for number, timestep in enumerate((0, 250, 750)):
        seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        handles = [
            made.denoiser.module.get_submodule(name).register_forward_hook(
                lambda _, a, out, name=name, seen=seen: seen.update({name: (a[0], out)})
            )
            for name in names
        ]
        example = made.example()
        made.denoiser(Inputs(example.sample, torch.tensor([timestep]), example.conditions))
        for handle in handles:
            handle.remove()
        for name, values in seen.items():
            for bounds, value in zip((found.inputs, found.outputs), values, strict=True):
                assert bounds.low[name][number] == pytest.approx(float(value.min()), abs=1e-5), name
                assert bounds.high[name][number] == pytest.approx(float(value.max()), abs=1e-5), name


def test_a_borrowed_layer_is_given_back(twins: Any) -> None:
    reference, quantized = (sampler.denoiser.module for sampler in twins())
    before = reference.conv_in
    with pytest.raises(KeyError), borrowed(reference, quantized, ["conv_in"]):
        assert reference.conv_in is quantized.conv_in
        raise KeyError
    assert reference.conv_in is before


@pytest.mark.parametrize("scheme", ["rtn_w4a8", "w4a8"])
def test_all_parts_together_are_the_quantized_model(
    twins: Any, analysed: Callable[[str], Analysis], scheme: str
) -> None:
    """Without attention products nothing but layers is quantized, temporal tables included."""
    reference, quantized = twins(scheme)
    calls = calls_of(reference)
    parts = analysed(scheme).sensitivity.parts
    assert parts[0].name == TEMPORAL and sum(len(part.layers) for part in parts) == len(
        packed_layers(quantized.denoiser.module)
    )
    every = LayerGroup("every", tuple(name for part in parts for name in part.layers))
    untouched = [reference.denoiser(call) for call in calls]
    found = sensitivity(reference.denoiser, quantized.denoiser, [every, *parts], calls)
    torch.testing.assert_close(found.error[0], found.whole, rtol=1e-4, atol=1e-6)
    assert (
        (found.whole > 0).all()
        and (found.error[1:].mean(dim=1) > 0).all()
        and (found.error[1:] < 5 * found.whole).all()
    )
    assert all(
        torch.equal(reference.denoiser(call), output) for call, output in zip(calls, untouched, strict=True)
    )


def test_a_part_that_is_not_quantized_costs_nothing(sampler: Make, twins: Any) -> None:
    _, quantized = twins()
    reference = sampler()
    found = sensitivity(
        reference.denoiser, quantized.denoiser, [LayerGroup("nothing", ())], calls_of(reference)
    )
    assert not found.error.any() and found.timesteps.tolist() == [750, 250]


def test_errors_of_layers_are_on_full_precision_inputs(twins: Any) -> None:
    reference, quantized = twins()
    calls = calls_of(reference)
    names = ["conv_in", "conv_out"]
    found = {
        layer.name: layer for layer in layer_errors(reference.denoiser, quantized.denoiser, names, calls)
    }
    twin, module = quantized.denoiser.module, reference.denoiser.module
    expected = []
    for call in calls:
        with twin.tfmq_steps.at(call.timestep):
            pair = module.conv_in(call.sample), twin.conv_in(call.sample)
        expected.append(float(relative_error(*(output.flatten(1) for output in pair)).mean()))
    assert found["conv_in"].error == pytest.approx(sum(expected) / 2, rel=1e-5)
    assert found.keys() == set(names) and all(
        layer.error > 0 and layer.quantized_ms > 0 and layer.full_ms > 0 for layer in found.values()
    )
    assert not module.conv_in._forward_hooks


def test_zeros_are_the_codes_at_the_zero_point_of_what_a_layer_reads(twins: Any) -> None:
    reference, quantized = twins()
    call = calls_of(reference)[0]
    # A quarter of the sample is zero, the rest far from it.
    sample = torch.full_like(call.sample, float(call.sample.max()))
    sample[:, :, : sample.shape[2] // 4] = 0.0
    (planted,) = layer_errors(
        reference.denoiser, quantized.denoiser, ["conv_in"], [replace(call, sample=sample)]
    )
    assert planted.zeros == 0.25
    (found,) = layer_errors(reference.denoiser, quantized.denoiser, ["conv_in"], [call])
    quantizer = quantized.denoiser.module.conv_in.input_quantizer
    with quantized.denoiser.module.tfmq_steps.at(call.timestep):
        rows = quantizer.rows(call.sample)
    scale, zero = float(rows.scale), float(rows.zero_point)
    codes = ((call.sample / scale).round() + zero).clamp(0, 255)
    assert found.zeros == pytest.approx(float((codes == zero).float().mean()), abs=1e-6)


def test_an_input_in_full_precision_has_no_share_of_zeros(sampler: Make) -> None:
    reference, quantized = sampler(), sampler()
    recipe = replace(tfmq.scheme("rtn_w4a8"), activations=Activations(bits=None), rules=())
    tfmq.quantize(quantized, replace(recipe, calibration=Calibration(samples=2, steps=4)))
    (found,) = layer_errors(reference.denoiser, quantized.denoiser, ["conv_in"], calls_of(reference))
    assert found.zeros is None


def test_more_bits_disturb_less(analysed: Callable[[str], Analysis]) -> None:
    low, high = map(analysed, ("rtn_w4a8", "rtn_w8a8"))
    assert high.sensitivity.whole.mean() < low.sensitivity.whole.mean() / 1.5
    assert high.trajectory.mean[-1] < low.trajectory.mean[-1] / 1.5
    assert sum(layer.error for layer in high.layers) < sum(layer.error for layer in low.layers) / 1.5
    assert (
        low.ranges.inputs.low.keys() == high.ranges.inputs.low.keys()
        and high.disturbance.max_relative_error < low.disturbance.max_relative_error
    )


def test_models_that_do_not_belong_together(twins: Any, sampler: Make) -> None:
    reference, quantized = twins()
    for pair, cause in (
        ((quantized, quantized), "quantized itself"),
        ((reference, reference), "not quantized"),
        ((sampler("plain"), quantized), "lacks"),
    ):
        with pytest.raises(ValueError, match=cause):
            analyze(*pair, extent=Extent(num_images=1), steps=2)


def test_activations_in_full_precision_are_analysed_too(sampler: Make) -> None:
    recipe = replace(
        tfmq.scheme("rtn_w4a32"), activations=Activations(bits=None, products=False, per_step="none")
    )
    reference, quantized = sampler("plain"), sampler("plain")
    tfmq.quantize(quantized, replace(recipe, calibration=Calibration(samples=1, steps=2, interval=1)))

    def as_images(made: LoopSampler) -> LoopSampler:
        inner = made.run
        made.run = lambda *a, **k: inner(*a, **k)[:, :1]  # type: ignore[method-assign]
        return made

    found = analyze(as_images(reference), as_images(quantized), extent=Extent(num_images=1), steps=2)
    assert found.sensitivity.whole.mean() > 0 and isinstance(reference.denoiser.module, nn.Module)


def test_a_quick_analysis_has_values_of_the_thorough_one(
    twins: Callable[..., tuple[LoopSampler, LoopSampler]], analysed: Callable[[str], Analysis]
) -> None:
    """Fewer units and calls are left out, evenly; what is there is what the thorough analysis has."""
    whole = analysed("rtn_w4a8")
    quick = analyze(*twins(), extent=replace(QUICK, parts=3), steps=4)
    names = [part.name for part in whole.sensitivity.parts]
    assert [part.name for part in quick.sensitivity.parts] == [
        names[0],
        names[round((len(names) - 1) / 2)],
        names[-1],
    ]
    assert quick.of_parts == whole.of_parts == len(names) and quick.sensitivity.error.shape == (3, 2)
    kept = [names.index(part.name) for part in quick.sensitivity.parts]
    assert torch.equal(quick.sensitivity.error, whole.sensitivity.error[kept][:, [0, -1]])
    assert {layer.name for layer in quick.layers} == {
        name for part in quick.sensitivity.parts for name in part.layers
    } & {layer.name for layer in whole.layers}


def test_more_work_is_expected_to_take_longer(twins: Callable[..., tuple[LoopSampler, LoopSampler]]) -> None:
    quick, thorough = (
        expected_seconds(*twins(), extent=extent, steps=4)
        for extent in (QUICK, Extent(num_images=1, calls=400))
    )
    assert 0 < quick < thorough
