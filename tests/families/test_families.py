"""Every family from loading to images: load, inspect, quantize, save, from_pretrained, sample, compare."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tfmq.evaluation.inspection import inspect

Make = Callable[[str], Any]
pytestmark = pytest.mark.filterwarnings("default")

# The denoiser, and what the temporal features depend on: a feature of the timestep alone is tabulated.
T = ("timestep",)
FAMILIES: dict[str, tuple[str, set[tuple[str, ...]]]] = {
    "ddpm": ("UNet2DModel", {T}),
    "ldm": ("UNet2DModel", {T}),
    "ldm_heads": ("UNet2DHeadsModel", {T}),
    "sd1": ("UNet2DConditionModel", {T}),
    "sd2": ("UNet2DConditionModel", {T}),
    "turbo": ("UNet2DConditionModel", {T}),
    "lcm": ("UNet2DConditionModel", {("timestep", "timestep_cond")}),
    "sdxl": ("UNet2DConditionModel", {T, ("text_embeds", "time_ids", "timestep")}),
    "dit": ("DiTTransformer2DModel", {("class_labels", "timestep")}),
    "pixart": ("PixArtTransformer2DModel", {T}),
    "sd3": ("SD3Transformer2DModel", {T, ("pooled_projections", "timestep")}),
    "sd3_without_t5": ("SD3Transformer2DModel", {T, ("pooled_projections", "timestep")}),
    "flux": ("FluxTransformer2DModel", {T, ("guidance", "pooled_projections", "timestep")}),
    "video_unet": ("UNet3DConditionModel", {T}),
    "animatediff": ("UNetMotionModel", {T}),
    "wan": ("WanTransformer3DModel", {T}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_inspection_says_what_temporal_features_depend_on(family: Make, name: str) -> None:
    denoiser, depends_on = FAMILIES[name]
    found = family(name).inspection
    features = [layer for layer in found.temporal if layer.role == "feature"]
    assert found.family == denoiser and {layer.depends_on for layer in features} == depends_on
    assert all(layer.cacheable == (layer.depends_on == T) for layer in features)
    assert family(name).scheme == found.schemes[0], "what inspection says to begin with is what was run here"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_quantized_pipeline_comes_back_and_predicts_nearly_the_same(family: Make, name: str) -> None:
    made = family(name)
    loaded = made.sampler(made.quantized)
    assert type(loaded.pipeline).__name__ == made.pipeline
    images, reference = (sampler.run(range(1), steps=4, seed=0) for sampler in (loaded, made.reference))
    assert torch.equal(images, made.in_memory.run(range(1), steps=4, seed=0))
    assert (
        images.shape == reference.shape
        and torch.isfinite(images).all()
        and not torch.equal(images, reference)
    )
    with torch.no_grad():
        pairs = [(loaded.denoiser(inputs), output) for inputs, output in made.calls]
    noise, signal = (
        sum(float(part.square().sum()) for part in parts)
        for parts in ([q - f for q, f in pairs], [f for _, f in pairs])
    )
    # Random weights are a hard case: 11 dB for wan, whose one token amplifies the rounding of its own input,
    # more for all others.
    assert 10 ** (10 / 10) * noise < signal


@pytest.mark.parametrize("name", ["dit", "pixart", "sd3", "flux", "wan"])
def test_the_transformer_scheme_measures_every_linear_layer_and_inspection_shows_it(
    family: Make, name: str
) -> None:
    made = family(name)
    assert {"transformer_w8a8", "transformer_w4a8"} <= set(made.inspection.schemes)
    found = inspect(made.sampler(made.quantized), directory=made.quantized)
    temporal = {layer.name for layer in found.temporal}
    kinds = {layer.name: layer.input for layer in found.layers}
    measured = {entry.name: entry.kept for entry in found.inputs}
    assert {name for name, kind in kinds.items() if kind == "dynamic"} == {
        name for name, kept in measured.items() if kept == "dynamic"
    }
    assert (
        measured
        and not temporal & measured.keys()
        and {kinds[name] for name in kinds.keys() - measured.keys()} == {"per_step"}
    )


# What a reader knows each family by.
NAMES = {
    "ddpm": "DDPM, DDIM",
    "ldm": "latent diffusion, VQ first stage",
    "ldm_heads": "latent diffusion, KL first stage, one number of heads at all widths",
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x, v-prediction",
    "turbo": "SD-Turbo",
    "lcm": "latent consistency models",
    "sdxl": "SDXL",
    "dit": "DiT",
    "pixart": "PixArt",
    "sd3": "Stable Diffusion 3",
    "sd3_without_t5": "Stable Diffusion 3 without T5",
    "flux": "FLUX.1",
    "video_unet": "text-to-video UNet",
    "animatediff": "AnimateDiff",
    "wan": "Wan, a video transformer",
}


def test_the_page_has_a_row_for_each_family(
    family: Make, documented: Callable[[str, list[str]], None]
) -> None:
    rows = [
        "| family | pipeline | denoiser | scheme | temporal features depend on | tabulated |",
        "|---|---|---|---|---|---|",
    ]
    for name in FAMILIES:
        made = family(name)
        features = [layer for layer in made.inspection.temporal if layer.role == "feature"]
        kinds = sorted({layer.depends_on for layer in features}, key=lambda kind: (kind != T, kind))
        served = "all" if kinds == [T] else "$`h(t)`$" if T in kinds else "none"
        depends = "; ".join(
            ", ".join(sorted(kind, key=lambda source: source != "timestep")) for kind in kinds
        )
        rows.append(
            f"| {NAMES[name]} | `{made.pipeline}` | `{made.inspection.family}` "
            f"| `{made.scheme}` | {depends} | {served} |"
        )
    documented("families", rows)
