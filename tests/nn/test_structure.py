import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.models.trace import trace
from tfmq.nn.plan import activation_sites, calibrated_layers, pack_all, prepare
from tfmq.nn.structure import assemble, describe, named_specs
from tfmq.nn.swap import networks_of, replace_module
from tfmq.nn.temporal import CachedFeature, FeatureTable, SkippedLayer
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Activations, Recipe, Rule, Weights

TIMESTEPS = torch.tensor([1.0, 5.0, 9.0])
MODELS = ["unet", "own_attention", "sdxl", "dit", "sd3", "plain", "upsampler"]
MIXED = (
    Recipe(name="w4a8", weights=Weights(ranges="min_max")),
    Recipe(
        name="mixed",
        weights=Weights(bits=3, symmetric=True, ranges="min_max"),
        activations=Activations(bits=5, symmetric=True, per_step="temporal", split=False),
        rules=(
            Rule(match="role:first", weights={"bits": None}, activations={"bits": None}),
            Rule(match="role:temporal", weights={"bits": 8}, activations={"bits": None}),
        ),
    ),
    Recipe(name="grouped", weights=Weights(ranges="min_max", group=8)),
    Recipe(name="dynamic", weights=Weights(ranges="min_max"), activations=Activations(tokens="dynamic")),
    Recipe(
        name="w4a32", weights=Weights(ranges="min_max"), activations=Activations(bits=None, products=False)
    ),
)


def randomize(module: nn.Module, seed: int) -> None:
    """Give every grid, code and table a value of its own, as if it had been fitted."""
    generator = torch.Generator().manual_seed(seed)

    def rand(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator)

    for site in activation_sites(module).values():
        site.fit(0.01 + 0.1 * rand(site.scale), (rand(site.zero_point) * (site.format.levels - 1)).round())
    for layer in calibrated_layers(module).values():
        layer.codes.copy_((rand(layer.codes) * (layer.grid.format.levels - 1)).round())
    for child in module.modules():
        if isinstance(child, FeatureTable):
            child.fit(rand(child.values) - 0.5)
        elif isinstance(child, CachedFeature):
            child.use_table.copy_(rand(child.use_table).round())


def quantized(denoiser: Denoiser, example: Inputs, recipe: Recipe, *, tables: bool = True) -> None:
    """Quantize in place with made-up parameters; with `tables`, the first temporal layer is skipped and
    cacheable features are cached.
    """
    found = trace(denoiser, example)
    steps = StepContext(TIMESTEPS)
    prepare(denoiser.module, make_plan(recipe, found), steps, timestep=denoiser.timestep)
    names = [layer.name for layer in found.temporal if layer.cacheable] if tables else []
    for number, name in enumerate(names):
        block = denoiser.module.get_submodule(name)
        table = FeatureTable(len(TIMESTEPS), block.weight.shape[0], "int8" if number % 2 else "float16")
        new = (
            CachedFeature(block, table, steps, everywhere=False)
            if name in found.features
            else SkippedLayer(block, block.weight.shape[0], steps)
        )
        replace_module(denoiser.module, name, new)
    randomize(denoiser.module, 3)
    pack_all(denoiser.module)


def outputs(denoiser: Denoiser, example: Inputs) -> list[Tensor]:
    batch = example.resized(3)
    with torch.no_grad():
        return [
            denoiser(Inputs(batch.sample, t, batch.conditions))
            for t in (torch.tensor([1, 9, 5]), torch.tensor([5, 5, 5]))
        ]


# Three architectures are enough for the variants.
CASES = [(name, MIXED[0]) for name in MODELS] + [
    (name, recipe) for name in ("unet", "plain", "sd3") for recipe in MIXED[1:]
]


@pytest.mark.parametrize(("name", "recipe"), CASES, ids=lambda value: getattr(value, "name", value))
def test_a_stock_architecture_is_rebuilt_to_the_bit_from_json_and_tensors(
    build: Callable[..., Any], name: str, recipe: Recipe
) -> None:
    denoiser, example = build(name)
    quantized(denoiser, example, recipe)
    structure = json.loads(json.dumps(describe(denoiser.module)))
    fresh, _ = build(name, seed=1)
    assemble(fresh.module, structure)
    fresh.module.load_state_dict(denoiser.module.state_dict())
    assert describe(fresh.module) == structure
    for one, other in zip(outputs(denoiser, example), outputs(fresh, example), strict=True):
        assert torch.isfinite(one).all() and torch.equal(one, other)


@pytest.mark.parametrize("name", ["unet", "sd3", "plain", "upsampler"])
def test_a_meta_architecture_is_filled_by_assignment(build: Callable[..., Any], name: str) -> None:
    denoiser, example = build(name)
    quantized(denoiser, example, MIXED[0])
    with torch.device("meta"):
        fresh, _ = build(name)
    assemble(fresh.module, describe(denoiser.module))
    assert {tensor.device.type for tensor in fresh.module.state_dict().values()} <= {"meta", "cpu"}
    fresh.module.load_state_dict(denoiser.module.state_dict(), assign=True)
    assert {tensor.device.type for tensor in fresh.module.state_dict().values()} == {"cpu"}
    for one, other in zip(outputs(denoiser, example), outputs(fresh, example), strict=True):
        assert torch.equal(one, other)


def test_describing_names_layers_products_tables_and_skips(build: Callable[..., Any]) -> None:
    denoiser, example = build("plain")
    quantized(denoiser, example, MIXED[0])
    structure = describe(denoiser.module)
    assert (structure["steps"], structure["timestep"]) == (3, "t")
    layers, tables, products = (
        dict(named_specs(structure, kind)) for kind in ("layers", "tables", "products")
    )
    assert sorted(layers) == [
        "embed",
        "entry",
        "exit",
        "stages.0.block",
        "stages.0.shift",
        "stages.1.block",
        "stages.1.shift",
    ]
    assert layers["exit"]["segments"] == [8, 8] and layers["entry"]["segments"] == []
    assert (layers["embed"]["input"]["axis"], layers["exit"]["input"]["axis"]) == (-1, 1)
    assert {name: (spec["format"], spec["everywhere"]) for name, spec in tables.items()} == {
        "stages.0.shift": ("int8", False),
        "stages.1.shift": ("float16", False),
    }
    assert structure["skipped"] == ["embed"]
    assert list(products) == [""] and [len(products[""][side]) for side in ("left", "right")] == [2, 2]


def test_layers_beyond_linear_ones_and_convolutions_say_their_kind(build: Callable[..., Any]) -> None:
    denoiser, example = build("upsampler")
    quantized(denoiser, example, MIXED[0])
    layers = dict(named_specs(describe(denoiser.module), "layers"))
    assert {name: spec.get("kind") for name, spec in layers.items() if "kind" in spec} == {
        "labels": "embedding",
        "up": "transposed_convolution",
    }
    assert (layers["labels"]["bits"], layers["labels"]["input"]) == (8, None) and layers["up"]["bits"] == 4
    assert sorted(layers) == ["embed", "entry", "exit", "labels", "shift", "up"]


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        (
            "up",
            "butterfly",
            (
                "up: the checkpoint holds a layer of kind 'butterfly', this tfmq "
                "knows 'embedding', 'transposed_convolution'; upgrade"
            ),
        ),
        ("up", None, "up: the checkpoint holds a quantized layer, the architecture has a ConvTranspose2d"),
        (
            "entry",
            "transposed_convolution",
            "entry: the checkpoint holds a quantized transposed convolution, the architecture has a Conv2d",
        ),
        (
            "entry",
            "embedding",
            "entry: the checkpoint holds a quantized embedding, the architecture has a Conv2d",
        ),
        ("norm", None, "norm: the checkpoint holds a quantized layer, the architecture has a GroupNorm"),
    ],
)
def test_a_kind_that_is_unknown_or_not_the_architectures_is_refused_by_name(
    build: Callable[..., Any], name: str, kind: str | None, message: str
) -> None:
    spec = {"bits": 4, "symmetric": False, "segments": [], "input": None, "names": [name]}
    structure = {
        "steps": 1,
        "timestep": "t",
        "layers": [spec if kind is None else {**spec, "kind": kind}],
        "products": [],
        "tables": [],
        "skipped": [],
    }
    with pytest.raises(ValueError, match=message):
        assemble(build("upsampler")[0].module, structure)


def test_tables_and_skips_over_full_precision_layers_are_rebuilt(build: Callable[..., Any]) -> None:
    recipe = Recipe(
        name="r",
        weights=Weights(ranges="min_max"),
        rules=(Rule(match="role:temporal", weights={"bits": None}, activations={"bits": None}),),
    )
    denoiser, example = build("unet")
    quantized(denoiser, example, recipe)
    fresh, _ = build("unet", seed=1)
    assemble(fresh.module, describe(denoiser.module))
    fresh.module.load_state_dict(denoiser.module.state_dict())
    for one, other in zip(outputs(denoiser, example), outputs(fresh, example), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m, "conv_in", nn.Identity()), r"conv_in: .* Identity"),
        (lambda m: delattr(m, "conv_out"), "conv_out, which"),
        (
            lambda m: setattr(m.mid_block, "attentions", nn.ModuleList([])),
            r"mid_block\.attentions\.0.*, which",
        ),
    ],
)
def test_another_architecture_is_refused_by_the_name_of_the_layer(
    build: Callable[..., Any], change: Callable[..., Any], message: str
) -> None:
    denoiser, example = build("unet")
    quantized(denoiser, example, MIXED[0])
    fresh, _ = build("unet", seed=1)
    change(fresh.module)
    with pytest.raises(ValueError, match=message):
        assemble(fresh.module, describe(denoiser.module))


@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_of_another_shape_is_refused_by_its_name_when_filled(
    build: Callable[..., Any], assign: bool
) -> None:
    denoiser, example = build("unet")
    quantized(denoiser, example, MIXED[0])
    fresh, _ = build("unet", seed=1)
    fresh.module.conv_in = nn.Conv2d(3, 9, 3)
    assemble(fresh.module, describe(denoiser.module))
    with pytest.raises(RuntimeError, match=r"size mismatch for conv_in\.packed"):
        fresh.module.load_state_dict(denoiser.module.state_dict(), assign=assign)


def test_a_table_for_a_missing_layer_is_refused_by_its_name(build: Callable[..., Any]) -> None:
    denoiser, example = build("unet")
    quantized(denoiser, example, MIXED[0])
    structure = describe(denoiser.module)
    for place, value in (
        ("tables", [{"format": "int8", "everywhere": True, "names": ["gone.proj"]}]),
        ("skipped", ["gone.proj"]),
    ):
        fresh, _ = build("unet", seed=1)
        with pytest.raises(ValueError, match=r"gone\.proj, which"):
            assemble(fresh.module, {**structure, place: value})


def test_a_layer_of_no_network_is_refused(build: Any) -> None:
    layer = {"bits": 8, "symmetric": True, "segments": [], "input": None, "names": ["entry"]}
    structure = {"steps": 1, "networks": ["stages"], "layers": [layer]}
    with pytest.raises(ValueError, match="names entry, which is part of none of its networks"):
        assemble(build("plain")[0].module, structure)


def test_a_network_without_a_timestep_is_described_by_its_name(build: Any) -> None:
    layer = {"bits": 8, "symmetric": True, "segments": [], "input": None, "names": ["stages.0.block"]}
    module = build("plain")[0].module
    assemble(module, {"steps": 1, "networks": ["stages.0"], "layers": [layer]})
    assert [*networks_of(module)] == ["stages.0"]
    described = describe(module)
    assert described["networks"] == ["stages.0"] and "timestep" not in described
    assert [name for name, _ in named_specs(described, "layers")] == ["stages.0.block"]
