"""What `inspect` says, against the models themselves."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tfmq
from tfmq.evaluation import inspection
from tfmq.evaluation.inspection import inspect
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.sampler import LoopSampler
from tfmq.models.trace import trace
from tfmq.nn.floating import floating, summary
from tfmq.nn.plan import packed_layers, packed_weights
from tfmq.nn.size import state_bytes
from tfmq.nn.temporal import CachedFeature
from tfmq.recipes.paper import PAPER
from tfmq.recipes.presets import rtn
from tfmq.recipes.recipe import Calibration, Temporal
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import Rounding

Pair = Callable[..., tuple[LoopSampler, LoopSampler]]
WEIGHTED = nn.Linear | nn.Conv2d


@pytest.mark.parametrize(
    ("name", "depends", "cacheable"),
    [("unet", ("timestep",), True), ("dit", ("class_labels", "timestep"), False)],
)
def test_full_precision(
    sampler: Callable[..., LoopSampler], name: str, depends: tuple[str, ...], cacheable: bool
) -> None:
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
    assert {name for name, role in roles.items() if role == "inner"} == {
        "time_embedding.linear_1",
        "time_embedding.linear_2",
    }
    assert all(name.endswith("time_emb_proj") for name, role in roles.items() if role == "feature")


@pytest.mark.parametrize("name", ["unet", "conditional", "dit"])
def test_quantized_agrees_with_its_original(pair: Pair, name: str) -> None:
    reference, quantized = pair(name)
    before, after = inspect(reference), inspect(quantized)
    module = quantized.denoiser.module
    assert (after.family, after.parameters, after.temporal) == (
        before.family,
        before.parameters,
        before.temporal,
    )
    assert after.units == before.units
    packed = packed_layers(module)
    assert {layer.name: layer.weight_bits for layer in after.layers} == {
        key: layer.format.bits for key, layer in packed.items()
    }
    assert {layer.weight_bits for layer in after.layers} == {4, 8}
    assert {layer.activation_bits for layer in after.layers} == {8}
    assert after.bytes == {"fp32": 4 * before.parameters, "quantized": state_bytes(module)}
    assert not after.predicted_bytes
    embeddings = {
        key for key, child in reference.denoiser.module.named_modules() if isinstance(child, nn.Embedding)
    }
    assert {layer.name for layer in before.embeddings} == embeddings
    assert {(layer.name, layer.weight_bits, layer.input) for layer in after.embeddings} == {
        (key, 8, "full") for key in embeddings
    }
    assert before.floating == after.floating


@pytest.mark.parametrize("bits", [4, 8])
def test_predicted_bytes_are_those_of_the_tensors(sampler: Callable[..., LoopSampler], bits: int) -> None:
    # Activations in full precision and no exceptions: weights and plain tensors are all there is, but for the
    # table of timesteps.
    recipe = rtn(tfmq.scheme(f"w{bits}a32"))
    recipe = replace(recipe, rules=(), calibration=Calibration(samples=1, steps=2))
    predicted = inspect(sampler()).predicted_bytes[f"w{bits}"]
    made = sampler()
    tfmq.quantize(made, recipe)
    assert predicted == state_bytes(made.denoiser.module) - 4 * 2


def test_predicted_bytes_have_transposed_convolutions_and_embeddings(
    sampler: Callable[..., LoopSampler],
) -> None:
    made, recipe = (
        sampler("upsampler"),
        replace(rtn(tfmq.scheme("w4a32")), rules=(), calibration=Calibration(samples=1, steps=2)),
    )
    predicted = inspect(made)
    kept = sum(entry.bytes for entry in predicted.floating)
    tfmq.quantize(made, recipe)
    assert (
        predicted.predicted_bytes["w4"] == state_bytes(made.denoiser.module) - 4 * 2 - 4 * 4
    )  # Timesteps, and a buffer that is no parameter.
    biases = sum(
        layer.bias.nbytes for layer in packed_layers(made.denoiser.module).values() if layer.bias is not None
    )
    codes = sum(state_bytes(child) for child in packed_weights(made.denoiser.module).values())
    assert kept == state_bytes(made.denoiser.module) - codes - 4 * 2 and biases > 0


def test_what_stays_in_floating_point_is_named_with_its_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(1))
            self.reflect = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
            self.norm = nn.LayerNorm(8)
            self.plain = nn.Conv2d(2, 2, 1)
            self.sized = nn.ConvTranspose2d(2, 2, 2, stride=2)
            self.idle = nn.Linear(2, 2)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            y = self.norm(self.plain(self.reflect(x))) * self.gain + t[:, None, None, None]
            return self.sized(y, output_size=(16, 16))[:, :, ::2, ::2]

    example = Inputs(torch.randn(1, 2, 8, 8), torch.tensor([5.0]))
    traced = trace(Denoiser(Odd()), example)
    assert [layer.name for layer in traced.layers] == ["plain"]
    found = floating(Odd(), (), quantized=traced.quantizable)
    assert {entry.name: entry.reason for entry in found} == {
        "": "tensors of its own",
        "reflect": "no integer operation for this kind",
        "norm": "norm",
        "sized": "no plain call of it",
        "idle": "no plain call of it",
    }
    assert [entry.bytes for entry in found] == sorted((entry.bytes for entry in found), reverse=True)
    assert summary(found, 4 * sum(entry.bytes for entry in found))["share"] == 0.25
    assert {entry.name for entry in floating(Odd(), {"plain"}) if entry.reason == "rule of the recipe"} == {
        "plain"
    }


def test_table_bytes_are_those_of_the_tables(sampler: Callable[..., LoopSampler]) -> None:
    made = sampler()
    recipe = replace(
        tfmq.scheme("w8a8"),
        rounding=Rounding(solver="nearest"),
        calibration=Calibration(samples=1, steps=4, interval=4),
    )
    predicted = inspect(made)
    tfmq.quantize(made, replace(recipe, temporal=Temporal(learning=Learning(iterations=0))))
    cached = [child for child in made.denoiser.module.modules() if isinstance(child, CachedFeature)]
    for steps in (20, 50):
        assert predicted.table_bytes[str(steps)] * 4 == steps * sum(
            state_bytes(child.table) + child.use_table.numel() for child in cached
        )


@pytest.mark.parametrize(
    ("name", "published"), [("unet", True), ("conditional", True), ("dit", False), ("plain", False)]
)
def test_schemes_fit_where_their_rules_match(
    sampler: Callable[..., LoopSampler], name: str, published: bool
) -> None:
    first = ("transformer_w8a8", "transformer_w4a8") if name == "dit" else ()
    assert inspect(sampler(name)).schemes == (*first, "w8a8", "w4a8", "w4a32", *(PAPER if published else ()))


def test_the_speed_class_follows_from_operators_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for operators, instructions, expected in (
        (False, ["avx512_vnni"], "simulated"),
        (True, ["avx2"], "integer-slow"),
        (True, ["amx_int8"], "integer"),
    ):
        monkeypatch.setattr(inspection, "available", lambda operators=operators: operators)
        monkeypatch.setattr(
            inspection,
            "describe_machine",
            lambda _, instructions=instructions: {"instructions": instructions},
        )
        assert inspection.speed_class() == expected
