"""LoRA: fused before quantization, refused beside it and after it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel

import tfmq
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.recipes import Calibration

pytestmark = pytest.mark.filterwarnings("default")


def adapted(build: Any) -> UNet2DConditionModel:
    """Return a UNet with an adapter that changes what it predicts."""
    from peft import LoraConfig

    unet: UNet2DConditionModel = build("conditional")[0].module
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    return unet


def loop(unet: UNet2DConditionModel) -> LoopSampler:
    return LoopSampler(Denoiser(unet), DDIMScheduler(), shape=(4, 8, 8), conditions={"encoder_hidden_states": torch.ones(1, 5, 8)})


QUICK = replace(tfmq.scheme("rtn_w8a8"), calibration=Calibration(samples=1, steps=2, interval=1, batch_size=1))


def test_a_fused_adapter_is_quantized_with_the_weights(build: Any, tmp_path: Path) -> None:
    unet, plain = adapted(build), loop(build("conditional")[0].module)
    unet.fuse_lora()
    unet.unload_lora()
    fused = loop(unet)
    expected, without = (sampler.run(range(1), steps=2, seed=0) for sampler in (fused, plain))
    tfmq.quantize(fused, QUICK, output_dir=tmp_path / "q")
    images = loop(tfmq.load(tmp_path / "q", backend="simulated")).run(range(1), steps=2, seed=0)
    assert float((images - expected).square().mean()) < 0.25 * float((without - expected).square().mean())


def test_an_adapter_beside_the_layers_is_refused_with_advice(build: Any) -> None:
    with pytest.raises(ValueError, match=r"UNet2DConditionModel carries LoRA adapters.*fuse_lora\(\)"):
        tfmq.quantize(loop(adapted(build)), QUICK)


def test_a_quantized_model_takes_no_adapter(build: Any, tmp_path: Path) -> None:
    pipeline = DDIMPipeline(build("unet")[0].module, DDIMScheduler())
    tfmq.quantize(pipeline, QUICK, output_dir=tmp_path / "q")
    for unet in (pipeline.unet, tfmq.load(tmp_path / "q", backend="simulated").unet):
        for entry in (unet.load_lora_adapter, unet.add_adapter):
            with pytest.raises(ValueError, match=r"integer layers take no LoRA.*fuse_lora\(\)"):
                entry({}, prefix=None)
