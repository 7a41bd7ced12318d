"""Models of today at their full size, without weights: parameters as published, and what quantization makes of them."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import tfmq
from tfmq.evaluation.inspection import Inspection, inspect
from tfmq.models.denoiser import Denoiser, Inputs

pytestmark = pytest.mark.filterwarnings("default")


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
    return unet, Inputs(torch.zeros(1, 4, 64, 64), torch.ones(1), {"encoder_hidden_states": torch.zeros(1, 77, 768)})


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


# Parameters as their publishers count them; of LDM-8, as its original layout has (tests/integrations/original).
SIZES: dict[str, tuple[Callable[[], tuple[Any, Inputs]], int]] = {
    "LDM-8, LSUN-Churches": (churches, 294_966_916),
    "Stable Diffusion 1.5": (sd15, 859_520_964),
    "SDXL": (sdxl, 2_567_463_684),
    "FLUX.1-dev": (flux, 11_901_408_320),
}


@pytest.fixture(scope="module")
def inspected() -> dict[str, Inspection]:
    found = {}
    for name, (build, _) in SIZES.items():
        with torch.device("meta"):
            module, example = build()
        found[name] = inspect(SimpleNamespace(denoiser=Denoiser(module), example=lambda example=example: example))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("name", SIZES)
def test_parameters_are_the_published_ones_and_bytes_follow(inspected: dict[str, Inspection], name: str) -> None:
    found, (_, parameters) = inspected[name], SIZES[name]
    assert found.parameters == parameters
    assert 0.25 < found.predicted_bytes["w8"] / (4 * parameters) < 0.26 and 0.125 < found.predicted_bytes["w4"] / (4 * parameters) < 0.14
    assert 0 < found.table_bytes["20"] < found.table_bytes["50"] < 2e6


def test_the_page_has_these_figures(inspected: dict[str, Inspection], documented: Callable[[str, list[str]], None]) -> None:
    rows = ["| model | parameters | fp32 | W8 | W4 | temporal layers | tables, 20 / 50 steps |", "|---|---|---|---|---|---|---|"]
    for name, found in inspected.items():
        sizes = [f"{count / 1e9:.2f} GB" for count in (4 * found.parameters, found.predicted_bytes["w8"], found.predicted_bytes["w4"])]
        temporal = f"{found.temporal_parameters / 1e6:.1f} M ({found.temporal_parameters / found.parameters:.1%})"
        tables = f"{found.table_bytes['20'] / 1e3:.0f} kB / {found.table_bytes['50'] / 1e3:.0f} kB"
        rows.append(f"| {name} | {found.parameters:,} | {' | '.join(sizes)} | {temporal} | {tables} |")
    documented("sizes", rows)
