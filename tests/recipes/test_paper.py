"""The published experiments as recipes and as figures."""

from collections.abc import Callable
from typing import Any

import pytest

from tfmq.models.trace import trace
from tfmq.recipes import scheme
from tfmq.recipes.paper import BITS, FULL_INPUTS, FULL_PRECISION, PAPER, PROTOCOLS, Protocol, released
from tfmq.recipes.plan import make_plan
from tfmq.recipes.yaml import dumps, from_dict, to_dict

yaml = pytest.importorskip("yaml")


@pytest.mark.parametrize("name", PAPER)
def test_a_preset_goes_by_its_name_and_survives_yaml(name: str) -> None:
    recipe = scheme(name)
    assert recipe.name == name
    assert from_dict(yaml.safe_load(dumps(recipe))) == recipe == from_dict(to_dict(recipe))


@pytest.mark.parametrize(
    ("name", "steps", "interval", "samples", "eta", "guidance"),
    [
        ("cifar10_ddim", 100, 5, 256, 0.0, None),
        ("ldm4_bedrooms", 200, 10, 256, 1.0, None),
        ("ldm8_churches", 400, 25, 256, 0.0, None),
        ("ldm4_celebahq", 200, 10, 256, 0.0, None),
        ("ldm4_ffhq", 200, 10, 256, 1.0, None),
        ("ldm4_imagenet", 20, 1, 256, None, 3.0),
        ("sd14_coco", 50, 1, 128, None, 7.5),
    ],
)
def test_the_protocols_are_the_published_ones(
    name: str, steps: int, interval: int, samples: int, eta: Any, guidance: Any
) -> None:
    for bits, widths in BITS.items():
        recipe = scheme(f"{name}_{bits}")
        run = recipe.calibration
        assert (run.steps, run.interval, run.samples, run.eta, run.guidance_scale) == (
            steps,
            interval,
            samples,
            eta,
            guidance,
        )
        assert (recipe.weights.bits, recipe.activations.bits) == widths
        assert (
            recipe.learning.iterations == 20_000
            and recipe.learning.learning_rate == 1e-3
            and recipe.temporal.maintenance == "block"
        )


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.name)
def test_published_figures_are_complete(protocol: Protocol) -> None:
    figures = protocol.results
    assert figures.keys() == ({"w4a32", "w4a8"} if protocol.name == "cifar10_ddim" else {"fp", *BITS})
    assert all(
        (result.clip_score is not None) == (protocol.name == "sd14_coco") for result in figures.values()
    )
    assert all(
        (result.inception_score is not None) == (protocol.name == "ldm4_imagenet")
        for result in figures.values()
    )
    assert all((result.sfid is None) == (protocol.name == "cifar10_ddim") for result in figures.values())


@pytest.mark.parametrize("model", ["unet", "conditional"])
def test_the_exceptions_of_the_released_code_match_layers_of_both_kinds_of_unet(
    build: Callable[..., Any], model: str
) -> None:
    denoiser, example = build(model)
    traced = trace(denoiser, example)
    plan = make_plan(scheme("ldm4_bedrooms_w4a8"), traced)
    kept = {layer.name for layer in traced.layers} - plan.layers.keys()
    assert {"conv_in", "conv_out", "time_embedding.linear_1"} <= kept
    assert any("conv_shortcut" in name for name in kept) and any("downsamplers" in name for name in kept)
    assert not any("upsamplers" in name for name in kept), "they are quantized"
    assert len(kept) < len(traced.layers) / 2 and len(FULL_PRECISION) == 5
    assert {name for name, layer in plan.layers.items() if layer.input is None} == set(FULL_INPUTS)
    assert all(plan.layers[name].weight.grid.bits == 4 for name in FULL_INPUTS)
    assert all(quantizer is None for _, quantizer in plan.products.values()) and plan.products
    assert not any(layer.segments for layer in traced.layers if layer.direct and layer.name in plan.layers)


def test_a_preset_with_exactly_these_exceptions() -> None:
    base = scheme("w4a8")
    found = released(base)
    assert found.name == "released_w4a8" and found.rules == scheme("ldm4_bedrooms_w4a8").rules
    assert not found.activations.products and found.weights.embeddings is None
    assert (found.rounding, found.temporal, found.calibration) == (
        base.rounding,
        base.temporal,
        base.calibration,
    )


def test_full_precision_has_to_reach_its_published_figure() -> None:
    (figure,) = scheme("ldm4_bedrooms_w4a8").published
    assert (figure.metric, figure.value, figure.num_images, figure.steps) == ("fid", 2.98, 50_000, 200)
    assert scheme("cifar10_ddim_w4a8").published == (), "no full-precision figure was printed"
