"""What `inspect` says, against the models themselves."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import nn

import tfmq
from tfmq.evaluation import inspection
from tfmq.evaluation.inspection import inspect
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.structure import state_bytes
from tfmq.nn.temporal import CachedFeature
from tfmq.recipes.paper import PAPER
from tfmq.recipes.presets import rtn
from tfmq.recipes.recipe import Calibration, Temporal
from tfmq.reconstruction.learning import Learning

Pair = Callable[..., tuple[LoopSampler, LoopSampler]]
WEIGHTED = nn.Linear | nn.Conv2d


@pytest.mark.parametrize(("name", "depends", "cacheable"), [("unet", ("timestep",), True), ("dit", ("class_labels", "timestep"), False)])
def test_full_precision(sampler: Callable[..., LoopSampler], name: str, depends: tuple[str, ...], cacheable: bool) -> None:
    made = sampler(name)
    module, found = made.denoiser.module, inspect(made)
    weighted = {key for key, child in module.named_modules() if isinstance(child, WEIGHTED)}
    assert found.family == type(module).__name__
    assert found.parameters == sum(p.numel() for p in module.parameters())
    assert {layer.name for layer in found.layers} == weighted
    assert {(layer.weight_bits, layer.activation_bits) for layer in found.layers} == {(None, None)}
    assert found.bytes == {"fp32": 4 * found.parameters, "quantized": None}
    features = [layer for layer in found.temporal if layer.role == "feature"]
    assert features and {(layer.depends_on, layer.cacheable) for layer in features} == {(depends, cacheable)}
    in_units = [layer for unit in found.units for layer in unit.layers]
    assert sorted(in_units) == sorted(weighted - {layer.name for layer in found.temporal})


def test_inner_layers_are_told_from_features(sampler: Callable[..., LoopSampler]) -> None:
    roles = {layer.name: layer.role for layer in inspect(sampler("unet")).temporal}
    assert {name for name, role in roles.items() if role == "inner"} == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert all(name.endswith("time_emb_proj") for name, role in roles.items() if role == "feature")


@pytest.mark.parametrize("name", ["unet", "conditional", "dit"])
def test_quantized_agrees_with_its_original(pair: Pair, name: str) -> None:
    reference, quantized = pair(name)
    before, after = inspect(reference), inspect(quantized)
    module = quantized.denoiser.module
    assert (after.family, after.parameters, after.temporal) == (before.family, before.parameters, before.temporal)
    assert after.units == before.units
    packed = packed_layers(module)
    assert {layer.name: layer.weight_bits for layer in after.layers} == {key: layer.format.bits for key, layer in packed.items()}
    assert {layer.weight_bits for layer in after.layers} == {4, 8}
    assert {layer.activation_bits for layer in after.layers} == {8}
    assert after.bytes == {"fp32": 4 * before.parameters, "quantized": state_bytes(module)}
    assert not after.predicted_bytes


@pytest.mark.parametrize("bits", [4, 8])
def test_predicted_bytes_are_those_of_the_tensors(sampler: Callable[..., LoopSampler], bits: int) -> None:
    # Activations in full precision and no exceptions: weights and plain tensors are all there is, but for the table of timesteps.
    recipe = rtn(tfmq.scheme(f"w{bits}a32"))
    recipe = replace(recipe, rules=(), calibration=Calibration(samples=1, steps=2))
    predicted = inspect(sampler()).predicted_bytes[f"w{bits}"]
    made = sampler()
    tfmq.quantize(made, recipe)
    assert predicted == state_bytes(made.denoiser.module) - 4 * 2


def test_table_bytes_are_those_of_the_tables(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler()
    recipe = replace(tfmq.scheme("w8a8"), learning=Learning(iterations=0), calibration=Calibration(samples=1, steps=4, interval=4))
    predicted = inspect(made)
    tfmq.quantize(made, replace(recipe, temporal=Temporal(learning=Learning(iterations=0))))
    cached = [child for child in made.denoiser.module.modules() if isinstance(child, CachedFeature)]
    for steps in (20, 50):
        assert predicted.table_bytes[str(steps)] * 4 == steps * sum(state_bytes(child.table) + child.use_table.numel() for child in cached)


@pytest.mark.parametrize(("name", "published"), [("unet", True), ("conditional", True), ("dit", False), ("plain", False)])
def test_schemes_fit_where_their_rules_match(sampler: Callable[..., LoopSampler], name: str, published: bool) -> None:
    first = ("transformer_w8a8", "transformer_w4a8") if name == "dit" else ()
    assert inspect(sampler(name)).schemes == (*first, "w8a8", "w4a8", "w4a32", *(PAPER if published else ()))


def test_the_speed_class_follows_from_operators_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for operators, instructions, expected in (
        (False, ["avx512_vnni"], "simulated"),
        (True, ["avx2"], "integer-slow"),
        (True, ["amx_int8"], "integer"),
    ):
        monkeypatch.setattr(inspection, "available", lambda operators=operators: operators)
        monkeypatch.setattr(inspection, "describe_machine", lambda _, instructions=instructions: {"instructions": instructions})
        assert inspection.speed_class() == expected
