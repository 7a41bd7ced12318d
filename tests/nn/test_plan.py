from collections.abc import Callable

import pytest
import torch

from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.plan import (
    Plan,
    activation_sites,
    calibrated_layers,
    pack_all,
    packed_layers,
    prepare,
)
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.scheme import ActivationScheme, LayerScheme, WeightScheme
from tfmq.nn.swap import replace_module
from tfmq.nn.temporal import CachedFeature, FeatureTable
from tfmq.numerics.grids import IntegerFormat
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid

A8 = ActivationScheme(grid=IntegerFormat(8), key="timestep", ranges="min_max")
STATIC = ActivationScheme(grid=IntegerFormat(4), ranges="search", segments=(8, 8))


def layer_scheme(
    bits: int = 4, *, segments: tuple[int, ...] = (), entry: ActivationScheme | None = A8
) -> LayerScheme:
    weight = WeightScheme(grid=IntegerFormat(bits), ranges="min_max", segments=segments)
    return LayerScheme(weight=weight, input=entry)


PLAN = Plan(
    {
        "entry": layer_scheme(8, entry=None),
        "stages.0.block": layer_scheme(3),
        "stages.0.shift": layer_scheme(),
        "exit": layer_scheme(segments=(8, 8), entry=STATIC),
    },
    {"": (2, A8)},
)
NAMES = list(PLAN.layers)


def test_a_prepared_model_still_computes_in_full_precision(build: Callable[..., tuple]) -> None:
    denoiser, inputs = build("plain")
    stock = denoiser(inputs)
    prepare(denoiser.module, PLAN, StepContext(torch.tensor([5.0, 7.0])), timestep="t")
    torch.testing.assert_close(denoiser(inputs), stock)
    assert denoiser.module.tfmq_timestep == "t"


def test_layers_and_sites_are_what_the_plan_says_and_nothing_else(build: Callable[..., tuple]) -> None:
    denoiser, _ = build("plain")
    sources = {name: denoiser.module.get_submodule(name).weight.clone() for name in NAMES}
    prepare(denoiser.module, PLAN, StepContext(torch.tensor([5.0, 7.0])), timestep="t")
    layers = calibrated_layers(denoiser.module)
    assert sorted(layers) == sorted(NAMES)
    assert [layers[name].grid.format.bits for name in NAMES] == [8, 3, 4, 4]
    for name in NAMES:
        assert torch.equal(
            layers[name].codes.float(),
            fit_grid(
                sources[name],
                PLAN.layers[name].weight.grid,
                segments=PLAN.layers[name].weight.segments,
                method="min_max",
            ).encode(sources[name]),
        )
    sites = activation_sites(denoiser.module)
    shapes = {name: tuple(site.scale.shape) for name, site in sites.items()}
    products = {f"tfmq_products.{side}.{site}": (2, 1) for side in ("left", "right") for site in range(2)}
    assert (
        shapes
        == {
            "stages.0.block.input_quantizer": (2, 1),
            "stages.0.shift.input_quantizer": (2, 1),
            "exit.input_quantizer": (1, 2),
        }
        | products
    )


def test_a_planned_layer_without_a_quantized_form_is_named(build: Callable[..., tuple]) -> None:
    denoiser, _ = build("plain")
    with pytest.raises(ValueError, match="stages is a ModuleList"):
        prepare(
            denoiser.module,
            Plan({"stages": layer_scheme()}, {}),
            StepContext(torch.tensor([5.0])),
            timestep="t",
        )


def test_packing_replaces_every_calibrated_layer_and_switches_products_on(
    build: Callable[..., tuple],
) -> None:
    denoiser, _ = build("plain")
    prepare(denoiser.module, PLAN, StepContext(torch.tensor([5.0])), timestep="t")
    pack_all(denoiser.module)
    assert sorted(packed_layers(denoiser.module)) == sorted(NAMES)
    assert calibrated_layers(denoiser.module) == {}
    assert [child.enabled for child in denoiser.module.modules() if isinstance(child, ProductQuantizers)] == [
        True
    ]


def test_a_layer_behind_a_table_goes_by_its_stock_name(build: Callable[..., tuple]) -> None:
    denoiser, _ = build("plain")
    steps = StepContext(torch.tensor([5.0]))
    prepare(denoiser.module, PLAN, steps, timestep="t")
    for name in ("stages.0.shift", "stages.0.block"):
        inner = denoiser.module.get_submodule(name)
        replace_module(
            denoiser.module, name, CachedFeature(inner, FeatureTable(1, 8, "int8"), steps, everywhere=True)
        )
    layers = calibrated_layers(denoiser.module)
    assert sorted(layers) == sorted(NAMES) and all(
        isinstance(layer, CalibratedLayer) for layer in layers.values()
    )
    pack_all(denoiser.module)
    packed = packed_layers(denoiser.module)
    assert sorted(packed) == sorted(NAMES) and all(
        isinstance(layer, PackedLayer) for layer in packed.values()
    )
    assert isinstance(denoiser.module.stages[0].shift, CachedFeature)
