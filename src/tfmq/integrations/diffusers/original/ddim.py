"""DDPM and DDIM checkpoints with the layout of their PyTorch releases (CIFAR-10, CelebA, LSUN): one `Model`
of `down`, `mid` and `up`.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from tfmq.integrations.diffusers.original.files import section, tensors_of
from tfmq.integrations.diffusers.original.fit import fit

_OUTER = {
    "temb.dense.0.": "time_embedding.linear_1.",
    "temb.dense.1.": "time_embedding.linear_2.",
    "mid.block_1.": "mid_block.resnets.0.",
    "mid.block_2.": "mid_block.resnets.1.",
    "mid.attn_1.": "mid_block.attentions.0.",
    "norm_out.": "conv_norm_out.",
}
_PARTS = {
    "block": "resnets",
    "attn": "attentions",
    "downsample.conv": "downsamplers.0.conv",
    "upsample.conv": "upsamplers.0.conv",
}
_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LEVEL = re.compile(r"(down|up)\.(\d+)\.(block|attn|downsample\.conv|upsample\.conv)\.")


def _renamed(key: str, levels: int) -> str:
    found = _LEVEL.match(key)
    if found:
        # The original counts levels by resolution on both ways, diffusers in the order of execution.
        number = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        key = f"{found[1]}_blocks.{number}.{_PARTS[found[3]]}.{key[found.end() :]}"
    for old, new in _OUTER.items():
        key = new + key.removeprefix(old) if key.startswith(old) else key
    stem, _, kind = key.rpartition(".")
    parent, _, last = stem.rpartition(".")
    inner = _ATTENTION if ".attentions." in key else _RESNET if ".resnets." in key else {}
    return f"{parent}.{inner[last]}.{kind}" if last in inner else key


def _linear(name: str, tensor: Tensor) -> Tensor:
    """Return the weight of attention, a 1x1 convolution in the original, as that of a linear layer."""
    return tensor[:, :, 0, 0] if ".attentions." in name and tensor.ndim == 4 else tensor


def choose_weights(states: Any, config: Mapping[str, Any], *, path: Path) -> dict[str, Tensor]:
    """Return the weights that the original samples with: the average where `model.ema` says so, kept last in
    a training checkpoint.
    """
    if isinstance(states, list | tuple) and states:
        states = states[-1] if config["model"].get("ema", True) else states[0]
    return {name.removeprefix("module."): tensor for name, tensor in tensors_of(states, path=path).items()}


def unet_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration of the `UNet2DModel` that computes what the original does."""
    model, size = section(config, "model"), int(section(config, "data", "image_size"))
    widths = tuple(section(config, "model", "ch") * factor for factor in section(config, "model", "ch_mult"))
    attends = [
        size // 2**level in section(config, "model", "attn_resolutions") for level in range(len(widths))
    ]
    return {
        "sample_size": size,
        "in_channels": section(config, "model", "in_channels"),
        "out_channels": section(config, "model", "out_ch"),
        "block_out_channels": widths,
        "layers_per_block": section(config, "model", "num_res_blocks"),
        "down_block_types": tuple("AttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        "dropout": model.get("dropout", 0.0),
        # The original has one head, sines before cosines, and a stride-2 convolution padded on the far sides
        # alone.
        "attention_head_dim": None,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "downsample_padding": 0,
        "norm_eps": 1e-6,
    }


def convert(states: Any, config: Mapping[str, Any], *, path: Path) -> DDIMPipeline:
    """Return the pipeline of a checkpoint in this layout.

    Raises:
        ValueError: the configuration lacks a field, or keys do not fit; lists them.
    """
    weights = choose_weights(states, config, path=path)
    unet = UNet2DModel(**unet_config(config))
    levels = len(unet.config.block_out_channels)
    renamed = {_renamed(name, levels): tensor for name, tensor in weights.items()}
    fit(unet, {name: _linear(name, tensor) for name, tensor in renamed.items()}, original=weights)
    betas = section(config, "diffusion")
    scheduler = DDIMScheduler(
        num_train_timesteps=section(config, "diffusion", "num_diffusion_timesteps"),
        beta_start=section(config, "diffusion", "beta_start"),
        beta_end=section(config, "diffusion", "beta_end"),
        beta_schedule=betas.get("beta_schedule", "linear"),
        clip_sample=False,
    )
    return DDIMPipeline(unet, scheduler)
