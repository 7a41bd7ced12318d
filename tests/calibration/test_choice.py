"""Which input grids a layer keeps: measured against a reference in float64, on layers with planted inputs,
and through a whole job.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.api import Quantized
from tfmq.calibration.choice import InputErrors, keep_better, measure_inputs
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.models.trace import trace
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers, packed_embeddings, prepare
from tfmq.nn.structure import describe, input_kind, named_specs
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Calibration, Recipe, Rule
from tfmq.storage.digest import tensor_digest

Made = tuple[LoopSampler, Quantized, Path]
OUTLIER, CONSTANT = "transformer_blocks.0.ff.net.2", "transformer_blocks.1.attn1.to_out.0"


def plant_outlier(module: nn.Module) -> None:
    """Let the first token be channel 5 and nothing else after its norm; the positions are not part of the
    state.
    """
    module.pos_embed.pos_embed[:, 0] = 0.0
    module.pos_embed.pos_embed[:, 0, 5] = 1000.0


def plant(module: nn.Module) -> None:
    """Make one token a hundred times larger than the others where the first feed-forward ends, and all tokens
    alike in the second attention.
    """
    generator = torch.Generator().manual_seed(1)
    plant_outlier(module)
    first, second = module.transformer_blocks
    with torch.no_grad():
        first.ff.net[0].proj.weight[:, 5] = 50 * torch.randn(64, generator=generator)
        second.attn1.to_v.weight.zero_()
        second.attn1.to_v.bias.copy_(torch.randn(16, generator=generator))
        # The layer's error is then that of its input, which no other weight has a part in.
        nn.init.eye_(second.attn1.to_out[0].weight)


def planted_sampler(build: Callable[..., Any]) -> LoopSampler:
    from diffusers import DDIMScheduler

    denoiser, example = build("dit")
    plant(denoiser.module)
    return LoopSampler(
        denoiser, DDIMScheduler(), shape=tuple(example.sample.shape[1:]), conditions=example.conditions
    )


@pytest.fixture
def planted(build: Callable[..., Any]) -> LoopSampler:
    return planted_sampler(build)


def transformer(name: str = "transformer_w8a8", **activations: Any) -> Recipe:
    recipe = replace(tfmq.scheme(name), calibration=Calibration(samples=2, steps=3, interval=1, batch_size=2))
    temporal = replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=1))
    # With few codes a fitted range matters most: where all tokens are alike, it can be fitted to the very
    # values.
    rules = (Rule(match=CONSTANT, weights={"bits": 8}, activations={"bits": 4}), *recipe.rules)
    return replace(
        recipe, temporal=temporal, rules=rules, activations=replace(recipe.activations, **activations)
    )


@pytest.fixture(scope="module")
def made(build: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Return the planted model, quantized once for all who only read it, with its report and where it was
    saved.
    """
    sampler, directory = planted_sampler(build), tmp_path_factory.mktemp("made") / "q"
    return sampler, tfmq.quantize(sampler, transformer(), output_dir=directory), directory


def test_outlier_tokens_make_dynamic_grids_win_and_equal_tokens_static_ones(made: Made) -> None:
    sampler, result, _ = made
    found = {entry["name"]: entry for entry in result.report["inputs"]}
    assert found[OUTLIER]["kept"] == "dynamic" and found[OUTLIER]["dynamic"] < 0.3 * found[OUTLIER]["static"]
    assert (
        found[CONSTANT]["kept"] == "static" and found[CONSTANT]["static"] < 0.9 * found[CONSTANT]["dynamic"]
    )
    assert all(
        (entry["dynamic"] < entry["static"]) is (entry["kept"] == "dynamic") for entry in found.values()
    )
    kinds = {
        name: input_kind(spec["input"]) for name, spec in named_specs(result.manifest["structure"], "layers")
    }
    assert {name for name, kind in kinds.items() if kind == "dynamic"} == {
        name for name, entry in found.items() if entry["kept"] == "dynamic"
    }
    # Convolutions and the temporal path keep their tables; an embedding has no input to quantize.
    others = kinds.keys() - found.keys() - packed_embeddings(sampler.denoiser.module).keys()
    assert others and {kinds[name] for name in others} == {"per_step"}
    assert result.manifest["provenance"]["inputs"] == result.report["inputs"]


def test_what_is_kept_is_saved_and_comes_back(made: Made) -> None:
    sampler, _, directory = made
    module = sampler.denoiser.module
    loaded = tfmq.load(directory, backend="simulated")
    plant_outlier(loaded)
    inputs = Inputs(torch.randn(2, 4, 8, 8), torch.tensor([333, 333]), {"class_labels": torch.tensor([3, 4])})
    with torch.no_grad():
        assert torch.equal(Denoiser(loaded)(inputs), Denoiser(module)(inputs))
    assert describe(loaded) == describe(module) and tensor_digest(loaded.state_dict()) == tensor_digest(
        module.state_dict()
    )
    assert "transformer_blocks.0.ff.net.2.input_quantizer.scale" not in loaded.state_dict()


def test_a_dynamic_grid_leaves_the_other_tokens_their_resolution(
    build: Callable[..., Any], planted: LoopSampler, made: Made
) -> None:
    inputs = Inputs(torch.randn(4, 4, 8, 8), torch.full((4,), 333), {"class_labels": torch.tensor([3] * 4)})
    calls: list[tuple[Tensor, Tensor]] = []
    module = planted.denoiser.module
    handle = module.get_submodule(OUTLIER).register_forward_hook(
        lambda _, args, output: calls.append((args[0], output))
    )
    with torch.no_grad():
        planted.denoiser(inputs)
    handle.remove()
    ((x, expected),) = calls
    errors, static = {}, planted_sampler(build)
    tfmq.quantize(static, transformer(tokens="static"))
    assert transformer().activations.tokens == "measured"
    for tokens, sampler in (("static", static), ("measured", made[0])):
        with torch.no_grad(), sampler.denoiser.module.tfmq_steps.at(inputs.timestep):
            difference = sampler.denoiser.module.get_submodule(OUTLIER)(x) - expected
        errors[tokens] = float(difference[:, 1:].square().mean())
    assert errors["measured"] < 0.5 * errors["static"]


def test_a_resumed_job_reads_back_what_was_measured(
    build: Callable[..., Any], made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tfmq.jobs.temporal.reconstruct_temporal", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tfmq.quantize(planted_sampler(build), transformer(), output_dir=tmp_path / "q")
    with monkeypatch.context() as patch:
        patch.setattr("tfmq.jobs.calibration.measure_inputs", interrupted)
        resumed = tfmq.quantize(planted_sampler(build), transformer(), output_dir=tmp_path / "q", resume=True)
    _, whole, _ = made
    assert (
        resumed.report["sha256"] == whole.report["sha256"]
        and resumed.report["inputs"] == whole.report["inputs"]
    )


def prepared(build: Callable[..., Any]) -> tuple[Denoiser, dict[str, CalibratedLayer], list[Inputs]]:
    denoiser, example = build("sd3")
    steps = StepContext(torch.tensor([5.0, 300.0]))
    plan = make_plan(Recipe(name="r", activations=Activations(tokens="measured")), trace(denoiser, example))
    prepare(denoiser.module, plan, steps, timestep=denoiser.timestep)
    measured = {
        name: layer
        for name, layer in calibrated_layers(denoiser.module).items()
        if plan.layers[name].input.tokens == "measured"
    }  # type: ignore[union-attr]
    batches = [
        Inputs(torch.randn(2, 4, 8, 8), torch.tensor([5, 300]), example.resized(2).conditions)
        for _ in range(2)
    ]
    return denoiser, measured, batches


def test_the_errors_are_those_of_the_outputs(build: Callable[..., Any]) -> None:
    denoiser, layers, batches = prepared(build)
    seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in layers}
    for name, layer in layers.items():
        assert isinstance(layer.input_quantizer, ActivationQuantizer)
        layer.input_quantizer.fit(torch.tensor([[0.02], [0.03]]), torch.tensor([[128.0], [100.0]]))

        def hook(module: Any, args: Any, _: Any, name: str = name) -> None:
            dynamic = DynamicQuantizer(module.input_quantizer.format)
            weight = module.weight.double().T
            seen[name].append(
                tuple(
                    x.double() @ weight for x in (args[0], module.input_quantizer(args[0]), dynamic(args[0]))
                )
            )  # type: ignore[arg-type]

        layer.register_forward_hook(hook)
    calls = []
    errors = measure_inputs(denoiser, layers, batches, advance=lambda amount=1: calls.append(amount))
    assert len(calls) == len(batches) and errors.keys() == layers.keys()
    for name, found in errors.items():
        energy = sum(float(exact.square().sum()) for exact, _, _ in seen[name])
        for index, error in ((1, found.static), (2, found.dynamic)):
            expected = sum(float((parts[index] - parts[0]).square().sum()) for parts in seen[name]) / energy
            assert error == pytest.approx(expected, rel=1e-3)


def test_the_better_one_is_kept_and_static_grids_in_a_tie(build: Callable[..., Any]) -> None:
    _, layers, _ = prepared(build)
    (name, layer), other = next(iter(layers.items())), list(layers)[1]
    before = layers[other].input_quantizer
    keep_better(layers, {name: InputErrors(0.2, 0.1), other: InputErrors(0.1, 0.1)})
    assert isinstance(layer.input_quantizer, DynamicQuantizer) and layers[other].input_quantizer is before
    assert InputErrors(0.0, 1e-9).kept == "static"


def test_a_layer_that_no_call_reaches_stays_static(build: Callable[..., Any]) -> None:
    denoiser, layers, _ = prepared(build)
    assert {
        found.kept for found in measure_inputs(denoiser, layers, [], advance=lambda amount=1: None).values()
    } == {"static"}


def test_a_layer_in_full_precision_is_not_measured(planted: LoopSampler) -> None:
    recipe = replace(
        transformer(), rules=(Rule(match="*.ff.*", weights={"bits": 8}, activations={"bits": None}),)
    )
    report = tfmq.quantize(planted, recipe).report
    assert report["inputs"] and not any(".ff." in entry["name"] for entry in report["inputs"])
