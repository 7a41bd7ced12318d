"""Components with quantized embeddings are saved and opened by diffusers itself."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

import tfmq
from tfmq.models.denoiser import Denoiser
from tfmq.models.sampler import LoopSampler
from tfmq.nn.plan import packed_embeddings
from tfmq.recipes.recipe import Calibration, Weights


@torch.no_grad()
def test_a_component_with_a_quantized_embedding_is_opened_to_the_bit_and_in_half_precision(
    sampler: Callable[..., LoopSampler], tmp_path: Path
) -> None:
    made = sampler("class_conditional")
    recipe = replace(
        tfmq.scheme("rtn_w4a8"),
        calibration=Calibration(samples=1, steps=2),
        weights=Weights(bits=4, ranges="min_max", embeddings=4),
    )
    tfmq.quantize(made, recipe)
    module = made.denoiser.module
    module.save_pretrained(str(tmp_path))
    inputs = replace(made.example().resized(2), timestep=module.tfmq_steps.timesteps[[0, 1]].long())
    opened = UNet2DConditionModel.from_pretrained(str(tmp_path))
    tfmq.execute(opened, "simulated")
    assert {name: layer.format.bits for name, layer in packed_embeddings(opened).items()} == {
        "class_embedding": 4
    }
    assert torch.equal(Denoiser(opened)(inputs), made.denoiser(inputs))
    half = UNet2DConditionModel.from_pretrained(str(tmp_path), torch_dtype=torch.bfloat16)
    tfmq.execute(half, "simulated")
    (table,) = packed_embeddings(half).values()
    assert table.scale.dtype == torch.float32 and table(torch.tensor([3])).dtype == torch.bfloat16
    low = inputs.map(lambda tensor: tensor.bfloat16() if tensor.is_floating_point() else tensor)
    assert Denoiser(half)(low).dtype == torch.bfloat16
