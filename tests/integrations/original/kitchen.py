"""Files as ComfyUI has them, quantized by comfy-kitchen in its eager arithmetic."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import published
import pytest
import torch
from torch import Tensor

from tfmq.integrations.diffusers.original.single_file import open_single_file
from tfmq.storage.atomic import write_tensors

pytest.importorskip("comfy_kitchen")
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout

PREFIX = "model.diffusion_model."
LINEAR = ("attn", "mlp", "ff.net", "linear1", "linear2", "proj_in")
MAKERS: dict[str, Callable[..., Any]] = {
    "flux": lambda folder: published.flux(folder, prefix=PREFIX),
    "sd3": published.sd3,
    "sdxl": published.sdxl,
    "sd1": published.stable_diffusion,
}


def is_linear(name: str, tensor: Tensor) -> bool:
    inner = name.startswith(PREFIX) and name.endswith(".weight") and tensor.ndim == 2
    return inner and any(part in name for part in LINEAR)


def marked(described: dict[str, Any]) -> Tensor:
    return torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)


def theirs(tensors: dict[str, Tensor], *, flat: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file with linear layers that comfy-kitchen quantized, and these: rotated ones, or with `flat`
    such with one scale for all.
    """
    found, layers = dict(tensors), {}
    for name, tensor in tensors.items():
        if is_linear(name, tensor):
            size = 64 if tensor.shape[1] % 64 == 0 and not flat else 0
            rotation = {"convrot": True, "convrot_groupsize": size} if size else {}
            codes, params = TensorWiseINT8Layout.quantize(tensor.float(), per_channel=not flat, **rotation)
            layer = name.removesuffix(".weight")
            mark = marked({"format": "int8_tensorwise", **rotation})
            found |= {name: codes, f"{layer}.weight_scale": params.scale, f"{layer}.comfy_quant": mark}
            layers[layer] = QuantizedTensor(codes, "TensorWiseINT8Layout", params)
    return found, layers


def opened(folder: Path, maker: str, tensors: dict[str, Tensor], parts: dict[str, Any]) -> Any:
    path = folder / "comfy.safetensors"
    write_tensors(path, tensors)
    base = published.flux_base(folder, parts) if maker == "flux" else None
    return open_single_file(path, base=base, tokenizer=str(folder / "tokenizer"))


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.components.get("transformer") or pipeline.unet


def without_t5(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if ".t5xxl." not in name}


def call(model: Any) -> Tensor:
    name = "unet" if "cross_attention_dim" in model.config else "transformer"
    generator = torch.Generator().manual_seed(2)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    t = torch.tensor([0.5])
    if name == "unet":
        added = {"text_embeds": noise(1, 64), "time_ids": noise(1, 6)}
        context = noise(1, 8, model.config["cross_attention_dim"])
        return model(noise(1, 4, 8, 8), 1000 * t, context, added_cond_kwargs=added)[0]
    if "pos_embed_max_size" in model.config:
        return model(noise(1, 16, 8, 8), noise(1, 8, 64), noise(1, 128), 1000 * t)[0]
    return model(noise(1, 4, 64), noise(1, 8, 64), noise(1, 64), t, torch.zeros(4, 3), torch.zeros(8, 3), t)[
        0
    ]
