"""What a quantized diffusers model was before."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import tfmq
from tfmq.integrations.diffusers.architecture import manifest_of, stock_architecture, stock_class
from tfmq.integrations.diffusers.quantizer import mark_quantized
from tfmq.models.sampler import LoopSampler
from tfmq.recipes.presets import rtn
from tfmq.recipes.recipe import Calibration


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def test_a_quantized_model_gives_back_its_architecture(sampler: Callable[..., LoopSampler]) -> None:
    from diffusers import UNet2DModel

    original, made = sampler().denoiser.module, sampler()
    assert manifest_of(original) is None
    result = tfmq.quantize(
        made, replace(rtn(tfmq.scheme("w4a8")), calibration=Calibration(samples=1, steps=2))
    )
    module = made.denoiser.module
    assert type(module) is not UNet2DModel and stock_class(module) is UNet2DModel
    mark_quantized(module, result.manifest)
    assert manifest_of(module) == result.manifest
    stock = stock_architecture(module)
    assert type(stock) is UNet2DModel and shapes(stock) == shapes(original)
    assert {parameter.device for parameter in stock.parameters()} == {torch.device("meta")}


def test_a_class_that_nobody_can_import_is_passed_over() -> None:
    from diffusers import UNet2DModel

    local = type("Local", (UNet2DModel,), {"__module__": "nowhere"})
    assert stock_class(local.__new__(local)) is UNet2DModel


def test_other_modules() -> None:
    assert manifest_of(nn.Linear(1, 1)) is None
    with pytest.raises(ValueError, match="no diffusers model"):
        stock_class(nn.Linear(1, 1))
