"""Parts of the latent-diffusion layout that diffusers has modules for and its converters no names."""

import re
from collections.abc import Mapping

from torch import Tensor

_RESAMPLER = re.compile(
    r"output_blocks\.(\d+)\.[12]\.(in_layers\.0|in_layers\.2|emb_layers\.1|out_layers\.0|out_layers\.3)\.(weight|bias)"
)
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_LEVEL = re.compile(r"(encoder\.down|decoder\.up)\.(\d+)\.attn\.(\d+)\.(norm|q|k|v|proj_out)\.(weight|bias)")
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def take_upsamplers(
    weights: Mapping[str, Tensor], layers: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the UNet's tensors without the residual blocks that upsample, and those by diffusers' names; a
    level has `layers` blocks and one.

    They stand behind the last block of a level, and behind its attention, where diffusers' converter looks
    for attention.
    """
    rest, taken = {}, {}
    for name, tensor in weights.items():
        found = _RESAMPLER.search(name)
        if found is None:
            rest[name] = tensor
        else:
            index, layer, kind = found.groups()
            taken[f"up_blocks.{int(index) // (layers + 1)}.upsamplers.0.{_RESNET[layer]}.{kind}"] = tensor
    return rest, taken


def rename_downsamplers(tensors: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """Return converted tensors in which the block after the last of `layers` of each level is what it is: the
    one that downsamples.
    """
    return {
        re.sub(rf"^(down_blocks\.\d+)\.resnets\.{layers}\.", r"\1.downsamplers.0.", name): tensor
        for name, tensor in tensors.items()
    }


def take_level_attention(
    weights: Mapping[str, Tensor], levels: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the first stage's tensors without the attention of its `levels` of resolution, and that by
    diffusers' names.

    Projections are 1x1 convolutions there and linear layers here; diffusers counts the levels of a decoder
    from the latents on.
    """
    rest, taken = {}, {}
    for name, tensor in weights.items():
        found = _LEVEL.search(name)
        if found is None:
            rest[name] = tensor
            continue
        coder, level, block, layer, kind = found.groups()
        place = int(level) if coder == "encoder.down" else levels - 1 - int(level)
        taken[f"{coder}_blocks.{place}.attentions.{block}.{_ATTENTION[layer]}.{kind}"] = (
            tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        )
    return rest, taken
