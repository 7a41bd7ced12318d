"""Configurations of the published single files' components, read off the shapes of their tensors.

What shapes do not say (the width of a head, a factor of the latents) is that of the published models.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from math import isqrt
from typing import Any

from torch import Size

Shapes = Mapping[str, Size]
# Most numbered parts, such as blocks, that may stand below one name. No model has more.
MOST_PARTS = 256
# Channels of a head: in UNets that project by linear layers and in SD3, and in FLUX with its rotary axes.
HEAD, FLUX_HEAD, FLUX_AXES = 64, 128, (16, 56, 56)
# Heads of a UNet that projects by convolutions, and channels of each of SDXL's six numbers of sizes.
HEADS, TIME_IDS = 8, 256


def shape_of(shapes: Shapes, name: str, axes: int) -> Size:
    """Return the shape of a tensor of so many axes, none of them empty.

    Raises:
        ValueError: there is none, or it has another number of axes.
    """
    if name not in shapes:
        raise ValueError(f"the checkpoint lacks {name}")
    shape = shapes[name]
    if len(shape) != axes or 0 in shape:
        raise ValueError(f"{name} is {list(shape)}; it needs {axes} axes, none of them empty")
    return shape


def count(names: Collection[str], prefix: str) -> int:
    """Return how many numbered parts stand below `prefix`.

    Raises:
        ValueError: more than any model has.
    """
    found = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
    total = len({match[1] for match in map(found.match, names) if match})
    if total > MOST_PARTS:
        raise ValueError(f"{total} parts stand below {prefix}; no model has more than {MOST_PARTS}")
    return total


def heads_of(width: int, head: int) -> int:
    """Return the number of heads of a layer.

    Raises:
        ValueError: heads do not divide it.
    """
    if width % head:
        raise ValueError(f"{width} channels do not divide into heads of {head}")
    return width // head


def _check_room(shapes: Shapes, parts: int) -> None:
    """Refuse a model of more parts than the file has tensors, before it is built.

    Raises:
        ValueError: says both numbers.
    """
    if parts > len(shapes):
        raise ValueError(f"it would have {parts} blocks, and the checkpoint has {len(shapes)} tensors")


def _levels(shapes: Shapes) -> list[list[tuple[int, int]]]:
    """Return the width and the number of transformer blocks of every layer on the way down, level by
    level.
    """
    levels: list[list[tuple[int, int]]] = [[]]
    for index in range(1, count(shapes, "input_blocks.")):
        block = f"input_blocks.{index}."
        if f"{block}0.op.weight" in shapes:
            levels.append([])
            continue
        width = shape_of(shapes, f"{block}0.out_layers.3.weight", 4)[0]
        levels[-1].append((width, count(shapes, f"{block}1.transformer_blocks.")))
    if not all(levels):
        raise ValueError("the checkpoint has a level without layers below input_blocks")
    return levels


def _listed(depths: Sequence[int], middle: int) -> list[int]:
    """Return how many transformer blocks each level has. Where no layer of a level attends that counts for
    nothing, but that the last number is the middle's.
    """
    return [depth or 1 for depth in depths[:-1]] + [depths[-1] or middle]


def unet(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the `UNet2DConditionModel` of Stable Diffusion 1.x, 2.x or XL.

    Raises:
        ValueError: a tensor is missing or has another number of axes.
    """
    levels = _levels(shapes)
    widths = tuple(level[-1][0] for level in levels)
    depths = [level[0][1] for level in levels]
    _check_room(shapes, sum(len(levels[0]) * (1 + depth) for depth in depths))
    listed = _listed(depths, count(shapes, "middle_block.1.transformer_blocks."))
    linear = len(shapes.get("middle_block.1.proj_in.weight", ())) == 2
    context = shape_of(shapes, "middle_block.1.transformer_blocks.0.attn2.to_k.weight", 2)[1]
    config = {
        "sample_size": 64,
        "in_channels": shape_of(shapes, "input_blocks.0.0.weight", 4)[1],
        "out_channels": shape_of(shapes, "out.2.weight", 4)[0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in depths[::-1]),
        "transformer_layers_per_block": 1 if set(listed) == {1} else tuple(listed),
        "cross_attention_dim": context,
        "use_linear_projection": linear,
        # diffusers calls the number of heads `attention_head_dim` here.
        "attention_head_dim": tuple(heads_of(width, HEAD) for width in widths) if linear else HEADS,
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": TIME_IDS,
            "projection_class_embeddings_input_dim": shape_of(shapes, "label_emb.0.0.weight", 2)[1],
        }
    return config


def sd3(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the `SD3Transformer2DModel`.

    Raises:
        ValueError: a tensor is missing or has another number of axes.
    """
    width, channels, patch, _ = shape_of(shapes, "x_embedder.proj.weight", 4)
    captions, joint = shape_of(shapes, "context_embedder.weight", 2)
    _, places, embedded = shape_of(shapes, "pos_embed", 3)
    if embedded != width:
        raise ValueError(f"pos_embed is {embedded} channels wide, x_embedder.proj.weight {width}")
    layers = count(shapes, "joint_blocks.")
    dual = (index for index in range(layers) if f"joint_blocks.{index}.x_block.attn2.qkv.weight" in shapes)
    norms = "joint_blocks.0.x_block.attn.ln_q.weight" in shapes
    return {
        "sample_size": 128,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": shape_of(shapes, "final_layer.linear.weight", 2)[0] // patch**2,
        "num_layers": layers,
        "attention_head_dim": HEAD,
        "num_attention_heads": heads_of(width, HEAD),
        "joint_attention_dim": joint,
        "caption_projection_dim": captions,
        "pooled_projection_dim": shape_of(shapes, "y_embedder.mlp.0.weight", 2)[1],
        "pos_embed_max_size": isqrt(places),
        "dual_attention_layers": tuple(dual),
        "qk_norm": "rms_norm" if norms else None,
    }


def flux(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the `FluxTransformer2DModel`.

    Raises:
        ValueError: a tensor is missing or has another number of axes, or heads are not 128 channels wide.
    """
    width, channels = shape_of(shapes, "img_in.weight", 2)
    (head,) = shape_of(shapes, "double_blocks.0.img_attn.norm.query_norm.scale", 1)
    if head != FLUX_HEAD:
        raise ValueError(f"heads of {head} channels; those of FLUX.1 have {FLUX_HEAD}")
    out = shape_of(shapes, "final_layer.linear.weight", 2)[0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": out,
        "num_layers": count(shapes, "double_blocks."),
        "num_single_layers": count(shapes, "single_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": heads_of(width, head),
        "joint_attention_dim": shape_of(shapes, "txt_in.weight", 2)[1],
        "pooled_projection_dim": shape_of(shapes, "vector_in.in_layer.weight", 2)[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in shapes,
        "axes_dims_rope": FLUX_AXES,
    }


def autoencoder(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the `AutoencoderKL`, but for the factors of its latents.

    Raises:
        ValueError: a tensor is missing or has another number of axes.
    """
    levels = count(shapes, "encoder.down.")
    widths = tuple(
        shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight", 4)[0] for level in range(levels)
    )
    _check_room(shapes, levels * count(shapes, "encoder.down.0.block."))
    return {
        "in_channels": shape_of(shapes, "encoder.conv_in.weight", 4)[1],
        "out_channels": shape_of(shapes, "decoder.conv_out.weight", 4)[0],
        "latent_channels": shape_of(shapes, "decoder.conv_in.weight", 4)[1],
        "block_out_channels": widths,
        "layers_per_block": count(shapes, "encoder.down.0.block."),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "use_quant_conv": "quant_conv.weight" in shapes,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes,
    }


def clip(shapes: Shapes) -> dict[str, Any]:
    """Return the sizes of a CLIP text encoder with the names of transformers.

    Raises:
        ValueError: a tensor is missing or has another number of axes.
    """
    vocabulary, width = shape_of(shapes, "text_model.embeddings.token_embedding.weight", 2)
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "max_position_embeddings": shape_of(shapes, "text_model.embeddings.position_embedding.weight", 2)[0],
        "num_hidden_layers": count(shapes, "text_model.encoder.layers."),
        "num_attention_heads": heads_of(width, HEAD),
        "projection_dim": shapes.get("text_projection.weight", (512,))[0],
    }


def t5(shapes: Shapes) -> dict[str, Any]:
    """Return the configuration of the encoder of T5 1.1 with the names of transformers.

    Raises:
        ValueError: a tensor is missing or has another number of axes.
    """
    vocabulary, width = shape_of(shapes, "shared.weight", 2)
    first = "encoder.block.0.layer"
    buckets, heads = shape_of(shapes, f"{first}.0.SelfAttention.relative_attention_bias.weight", 2)
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shape_of(shapes, f"{first}.0.SelfAttention.q.weight", 2)[0] // heads,
        "d_ff": shape_of(shapes, f"{first}.1.DenseReluDense.wi_0.weight", 2)[0],
        "num_layers": count(shapes, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "tie_word_embeddings": False,
    }
