from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from tfmq.models.trace import trace
from tfmq.reconstruction.units import Unit, find_units

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
RESNET = ("conv1", "time_emb_proj", "conv2")
SHORTCUT = (*RESNET, "conv_shortcut")
CROSS = (
    *(f"{kind}.{layer}" for kind in ("attn1", "attn2") for layer in ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)


def cross(name: str) -> dict[str, tuple[str, ...]]:
    return {f"{name}.proj_in": ("",), f"{name}.transformer_blocks.0": CROSS, f"{name}.proj_out": ("",)}


def unet(
    attention: Callable[[str], dict[str, tuple[str, ...]]], *, added: bool = False
) -> dict[str, tuple[str, ...]]:
    return {
        "time_embedding": ("linear_1", "linear_2"),
        **({"add_embedding": ("linear_1", "linear_2")} if added else {}),
        "conv_in": ("",),
        "down_blocks.0.resnets.0": RESNET,
        "down_blocks.0.downsamplers.0": ("conv",),
        "down_blocks.1.resnets.0": SHORTCUT,
        **attention("down_blocks.1.attentions.0"),
        "mid_block.resnets.0": RESNET,
        **attention("mid_block.attentions.0"),
        "mid_block.resnets.1": RESNET,
        "up_blocks.0.resnets.0": SHORTCUT,
        **attention("up_blocks.0.attentions.0"),
        "up_blocks.0.resnets.1": SHORTCUT,
        **attention("up_blocks.0.attentions.1"),
        "up_blocks.0.upsamplers.0": ("conv",),
        "up_blocks.1.resnets.0": SHORTCUT,
        "up_blocks.1.resnets.1": SHORTCUT,
        "conv_out": ("",),
    }


DIT_EMBEDDER = ("norm1.emb.timestep_embedder.linear_1", "norm1.emb.timestep_embedder.linear_2")
DIT_BLOCK = (
    *DIT_EMBEDDER,
    "norm1.linear",
    *(f"attn1.{layer}" for layer in ATTENTION),
    "ff.net.0.proj",
    "ff.net.2",
)
JOINT = (
    "norm1.linear",
    "norm1_context.linear",
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
)
FEED_FORWARD = ("ff.net.0.proj", "ff.net.2")
# Unit -> its layers below it, in execution order; "" is the unit itself.
UNITS: dict[str, dict[str, tuple[str, ...]]] = {
    "unet": unet(lambda name: {name: ATTENTION}),
    "own_attention": unet(lambda name: {name: ATTENTION}),
    "conditional": unet(cross),
    "class_conditional": unet(cross),
    "sdxl": unet(cross, added=True),
    "dit": {
        "pos_embed": ("proj",),
        "transformer_blocks.0": DIT_BLOCK,
        "transformer_blocks.1": DIT_BLOCK,
        "proj_out_1": ("",),
        "proj_out_2": ("",),
    },
    "sd3": {
        "pos_embed": ("proj",),
        "time_text_embed": (
            "timestep_embedder.linear_1",
            "timestep_embedder.linear_2",
            "text_embedder.linear_1",
            "text_embedder.linear_2",
        ),
        "context_embedder": ("",),
        "transformer_blocks.0": (
            *JOINT,
            "attn.to_add_out",
            "attn.to_out.0",
            *FEED_FORWARD,
            "ff_context.net.0.proj",
            "ff_context.net.2",
        ),
        "transformer_blocks.1": (*JOINT, "attn.to_out.0", *FEED_FORWARD),
        "norm_out": ("linear",),
        "proj_out": ("",),
    },
    "plain": {
        "embed": ("",),
        "entry": ("",),
        "stages.0": ("shift", "block"),
        "stages.1": ("shift", "block"),
        "exit": ("",),
    },
}


def named(units: tuple[Unit, ...]) -> dict[str, set[str]]:
    return {unit.name: {layer[len(unit.name) + 1 :] for layer in unit.layers} for unit in units}


@pytest.mark.parametrize("name", UNITS)
def test_units_of_every_model(build: Callable[..., Any], name: str) -> None:
    denoiser, example = build(name)
    found = trace(denoiser, example)
    order = [layer.name for layer in found.layers]
    units = find_units(denoiser.module, order)
    assert [unit.name for unit in units] == list(UNITS[name])
    assert named(units) == {unit: set(layers) for unit, layers in UNITS[name].items()}
    assert sorted(layer for unit in units for layer in unit.layers) == sorted(order), (
        "every layer is in exactly one unit"
    )
    assert all(list(unit.layers) == sorted(unit.layers, key=order.index) for unit in units)


@pytest.mark.parametrize("name", UNITS)
def test_excluded_layers_are_in_no_unit_and_change_no_other(build: Callable[..., Any], name: str) -> None:
    denoiser, example = build(name)
    found = trace(denoiser, example)
    temporal = {layer.name for layer in found.temporal}
    order = [layer.name for layer in found.layers]
    units = named(find_units(denoiser.module, order, exclude=sorted(temporal)))
    full = {
        unit: {layer for layer in layers if f"{unit}.{layer}".removesuffix(".") not in temporal}
        for unit, layers in UNITS[name].items()
    }
    assert units == {unit: layers for unit, layers in full.items() if layers}


def test_sequences_and_lists_of_plain_layers_are_one_unit() -> None:
    module = nn.Module()
    module.block = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    module.parts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    module.single = nn.Linear(2, 2)
    order = ["single", "block.0", "block.2", "parts.0", "parts.1"]
    assert find_units(module, order) == (
        Unit("single", ("single",)),
        Unit("block", ("block.0", "block.2")),
        Unit("parts.0", ("parts.0",)),
        Unit("parts.1", ("parts.1",)),
    )


def test_names_that_begin_alike_are_not_confused() -> None:
    module = nn.Module()
    module.layer, module.layer1 = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    assert find_units(module, ["layer1", "layer.0"]) == (
        Unit("layer1", ("layer1",)),
        Unit("layer", ("layer.0",)),
    )


def test_layers_that_stay_in_full_precision_do_not_make_units(build: Callable[..., Any]) -> None:
    denoiser, _ = build("plain")
    assert find_units(denoiser.module, ["stages.1.block"]) == (Unit("stages.1", ("stages.1.block",)),)
    assert find_units(denoiser.module, []) == ()
