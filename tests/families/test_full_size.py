"""Models of today at their full size, without weights: parameters as published, and what quantization makes
of them.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import tfmq
from tfmq.evaluation.inspection import Inspection, inspect
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.recipes.paper import BITS, PROTOCOLS

pytestmark = pytest.mark.filterwarnings("default")


def cifar10() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
    )
    return unet, Inputs(torch.zeros(1, 3, 32, 32), torch.ones(1), {})


def ldm4() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DModel(
        sample_size=64,
        block_out_channels=(224, 448, 672, 896),
        down_block_types=("DownBlock2D",) + ("AttnDownBlock2D",) * 3,
        up_block_types=("AttnUpBlock2D",) * 3 + ("UpBlock2D",),
        attention_head_dim=32,
    )
    return unet, Inputs(torch.zeros(1, 3, 64, 64), torch.ones(1), {})


def imagenet() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=64,
        in_channels=3,
        out_channels=3,
        block_out_channels=(192, 384, 576, 960),
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        attention_head_dim=(6, 12, 18, 30),
        cross_attention_dim=512,
    )
    return unet, Inputs(
        torch.zeros(1, 3, 64, 64), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 1, 512)}
    )


def churches() -> tuple[Any, Inputs]:
    unet = tfmq.UNet2DHeadsModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(192, 384, 384, 768, 768),
        down_block_types=("AttnDownBlock2D",) * 4 + ("ResnetDownsampleBlock2D",),
        up_block_types=("ResnetUpsampleBlock2D",) + ("AttnUpBlock2D",) * 4,
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attn_norm_num_groups=32,
        num_attention_heads=8,
    )
    return unet, Inputs(torch.zeros(1, 4, 32, 32), torch.ones(1), {})


def sd15() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    return unet, Inputs(
        torch.zeros(1, 4, 64, 64), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 77, 768)}
    )


def sd21() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=96,
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )
    return unet, Inputs(
        torch.zeros(1, 4, 96, 96), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 77, 1024)}
    )


def sdxl() -> tuple[Any, Inputs]:
    unet = diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )
    added = {"text_embeds": torch.zeros(1, 1280), "time_ids": torch.zeros(1, 6)}
    conditions = {"encoder_hidden_states": torch.zeros(1, 77, 2048), "added_cond_kwargs": added}
    return unet, Inputs(torch.zeros(1, 4, 128, 128), torch.ones(1), conditions)


def dit() -> tuple[Any, Inputs]:
    transformer = diffusers.DiTTransformer2DModel(sample_size=32, out_channels=8)
    return transformer, Inputs(
        torch.zeros(1, 4, 32, 32), torch.ones(1), {"class_labels": torch.zeros(1, dtype=torch.long)}
    )


def pixart() -> tuple[Any, Inputs]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128, caption_channels=4096, interpolation_scale=2, use_additional_conditions=False
    )
    return transformer, Inputs(
        torch.zeros(1, 4, 128, 128), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 300, 4096)}
    )


def sd3() -> tuple[Any, Inputs]:
    transformer = diffusers.SD3Transformer2DModel(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        joint_attention_dim=4096,
        pos_embed_max_size=192,
    )
    conditions = {
        "encoder_hidden_states": torch.zeros(1, 333, 4096),
        "pooled_projections": torch.zeros(1, 2048),
    }
    return transformer, Inputs(torch.zeros(1, 16, 128, 128), torch.ones(1), conditions)


def flux() -> tuple[Any, Inputs]:
    transformer = diffusers.FluxTransformer2DModel(guidance_embeds=True)
    conditions = {
        "encoder_hidden_states": torch.zeros(1, 512, 4096),
        "pooled_projections": torch.zeros(1, 768),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(4096, 3),
        "txt_ids": torch.zeros(512, 3),
    }
    return transformer, Inputs(torch.zeros(1, 4096, 64), torch.ones(1), conditions)


# Parameters as their publishers count them; of LDM-8, as its original layout has
# (tests/integrations/original). Latent Diffusion prints its own in millions: 274 (LDM-4, unconditional), 294
# (LDM-8), 400 (LDM-4, ImageNet).
SIZES: dict[str, tuple[Callable[[], tuple[Any, Inputs]], int]] = {
    "DDIM, CIFAR-10": (cifar10, 35_746_307),
    "LDM-4, LSUN-Bedrooms, CelebA-HQ, FFHQ": (ldm4, 274_056_163),
    "LDM-8, LSUN-Churches": (churches, 294_966_916),
    "LDM-4, ImageNet": (imagenet, 400_920_579),
    "Stable Diffusion 1.4, 1.5": (sd15, 859_520_964),
    "Stable Diffusion 2.1": (sd21, 865_910_724),
    "SDXL": (sdxl, 2_567_463_684),
    # 675,129,632 without positions, which diffusers computes, and with 28 blocks that each embed timestep and
    # class, where the original does once.
    "DiT-XL/2": (dit, 675_129_632 - 256 * 1152 + 27 * (1001 * 1152 + (256 + 1) * 1152 + (1152 + 1) * 1152)),
    "PixArt-Sigma": (pixart, 610_856_096),
    "Stable Diffusion 3 medium": (sd3, 2_028_328_000),
    "FLUX.1-dev": (flux, 11_901_408_320),
}
# Rows of tables that are looked up, of a width: eight bits and a scale, whatever the layers have.
LOOKED_UP = {"DiT-XL/2": (28 * 1001, 1152)}
EXPERIMENTS = {
    "DDIM, CIFAR-10": {"cifar10_ddim"},
    "LDM-4, LSUN-Bedrooms, CelebA-HQ, FFHQ": {"ldm4_bedrooms", "ldm4_celebahq", "ldm4_ffhq"},
    "LDM-8, LSUN-Churches": {"ldm8_churches"},
    "LDM-4, ImageNet": {"ldm4_imagenet"},
    "Stable Diffusion 1.4, 1.5": {"sd14_coco"},
}


@pytest.fixture(scope="module")
def inspected() -> dict[str, Inspection]:
    found = {}
    for name, (build, _) in SIZES.items():
        with torch.device("meta"):
            module, example = build()
        found[name] = inspect(
            SimpleNamespace(denoiser=Denoiser(module), example=lambda example=example: example)
        )  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones_and_bytes_follow(
    inspected: dict[str, Inspection], name: str
) -> None:
    found, (_, parameters) = inspected[name], SIZES[name]
    assert found.parameters == parameters
    rows, width = LOOKED_UP.get(name, (0, 0))
    shares = {
        bits: (found.predicted_bytes[bits] - rows * (width + 4)) / (4 * (parameters - rows * width))
        for bits in ("w8", "w4")
    }
    assert 0.25 < shares["w8"] < 0.26 and 0.125 < shares["w4"] < 0.14
    tabulated = any(layer.cacheable for layer in found.temporal if layer.role == "feature")
    assert tabulated == (name != "DiT-XL/2")
    assert (
        0 < found.table_bytes["20"] < found.table_bytes["50"] < 2e6
        if tabulated
        else set(found.table_bytes.values()) == {0}
    )


def test_the_published_recipes_fit_the_published_models(inspected: dict[str, Inspection]) -> None:
    assert set.union(*EXPERIMENTS.values()) == {protocol.name for protocol in PROTOCOLS}
    for name, experiments in EXPERIMENTS.items():
        assert {f"{experiment}_{bits}" for experiment in experiments for bits in BITS} <= set(
            inspected[name].schemes
        )


def test_the_page_has_these_figures(
    inspected: dict[str, Inspection], documented: Callable[[str, list[str]], None]
) -> None:
    rows = [
        "| model | parameters | fp32 | W8 | W4 | temporal layers | tables, 20 / 50 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in inspected.items():
        sizes = [
            f"{count / 1e9:.2f} GB"
            for count in (4 * found.parameters, found.predicted_bytes["w8"], found.predicted_bytes["w4"])
        ]
        temporal = (
            f"{found.temporal_parameters / 1e6:.1f} M ({found.temporal_parameters / found.parameters:.1%})"
        )
        tables = f"{found.table_bytes['20'] / 1e3:.0f} kB / {found.table_bytes['50'] / 1e3:.0f} kB"
        rows.append(f"| {name} | {found.parameters:,} | {' | '.join(sizes)} | {temporal} | {tables} |")
    documented("sizes", rows)
