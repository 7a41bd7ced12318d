"""A tiny quantized pipeline on disk beside its original."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    shape = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    kinds = {
        "down_block_types": ("AttnDownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "attention_head_dim": 8,
    }
    directory = tmp_path_factory.mktemp("models") / "original"
    DDIMPipeline(UNet2DModel(**shape, **kinds), DDIMScheduler()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory, original: Path) -> Path:
    import tfmq

    recipe = tfmq.scheme("rtn_w8a8")
    directory = tmp_path_factory.mktemp("runs") / "w8a8"
    calibration = replace(recipe.calibration, samples=1, steps=3, interval=1, batch_size=1)
    tfmq.quantize(str(original), replace(recipe, calibration=calibration), output_dir=directory)
    return directory
