"""Which tensors of the published single files are which of diffusers' denoisers: Stable Diffusion 1.x, 2.x
and XL, Stable Diffusion 3, and FLUX.1.
"""

import re
from collections.abc import Callable, Iterator, Mapping

from diffusers import ModelMixin

from tfmq.integrations.diffusers.original.rows import Rows

Layers = Mapping[str, tuple[str, ...]]
KINDS = ("weight", "bias")

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.")

SD3: Layers = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": ("time_text_embed.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": ("time_text_embed.timestep_embedder.linear_2",),
    "y_embedder.mlp.0": ("time_text_embed.text_embedder.linear_1",),
    "y_embedder.mlp.2": ("time_text_embed.text_embedder.linear_2",),
    "context_embedder": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
SD3_BLOCK: Layers = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn.ln_q": ("attn.norm_q",),
    "x_block.attn.ln_k": ("attn.norm_k",),
    "x_block.attn.proj": ("attn.to_out.0",),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "x_block.attn2.ln_q": ("attn2.norm_q",),
    "x_block.attn2.ln_k": ("attn2.norm_k",),
    "x_block.attn2.proj": ("attn2.to_out.0",),
    "x_block.adaLN_modulation.1": ("norm1.linear",),
    "x_block.mlp.fc1": ("ff.net.0.proj",),
    "x_block.mlp.fc2": ("ff.net.2",),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "context_block.attn.ln_q": ("attn.norm_added_q",),
    "context_block.attn.ln_k": ("attn.norm_added_k",),
    "context_block.attn.proj": ("attn.to_add_out",),
    "context_block.adaLN_modulation.1": ("norm1_context.linear",),
    "context_block.mlp.fc1": ("ff_context.net.0.proj",),
    "context_block.mlp.fc2": ("ff_context.net.2",),
}
FLUX: Layers = {
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
FLUX_DOUBLE: Layers = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
FLUX_SINGLE: Layers = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}


def _unet_name(name: str, layers: int, attends: Mapping[int, bool]) -> str:
    """Return the original name of a UNet's tensor; a level has so many `layers` on the way down, and one more
    on the way up, where those of `attends` have attention.
    """
    found, layer = _BLOCK.match(name), name
    if found:
        way, level, kind, place = found[1], int(found[2]), found[3], int(found[4])
        if kind == "downsamplers":
            layer = f"input_blocks.{(level + 1) * (layers + 1)}.0.op."
        elif kind == "upsamplers":
            layer = f"output_blocks.{level * (layers + 1) + layers}.{1 + attends[level]}.conv."
        else:
            index = level * (layers + 1) + place + (way == "down")
            layer = f"{'in' if way == 'down' else 'out'}put_blocks.{index}.{int(kind == 'attentions')}."
        # The convolution of a resampler is all of it.
        layer += name[found.end() :].removeprefix("conv." if kind.endswith("samplers") else "")
    for own, original in _UNET.items():
        layer = f"{original}.{layer.removeprefix(f'{own}.')}" if layer.startswith(f"{own}.") else layer
    if ".resnets." in name:
        parent, last, kind = layer.rsplit(".", 2)
        layer = f"{parent}.{_RESNET[last]}.{kind}"
    return layer


def unet_table(model: ModelMixin) -> list[Rows]:
    """Return the table of a `UNet2DConditionModel`: every original tensor is one of diffusers'."""
    names = model.state_dict()
    ups = range(len(model.config["up_block_types"]))
    attends = {
        level: any(name.startswith(f"up_blocks.{level}.attentions.") for name in names) for level in ups
    }
    layers = model.config["layers_per_block"]
    return [Rows(_unet_name(name, layers, attends), (name,)) for name in names]


def _entries(
    layers: Layers, model: Mapping[str, object], original: str = "", own: str = "", swapped: str = ""
) -> Iterator[Rows]:
    """Yield the tensors of `layers`, below `original` and `own`, that the model has."""
    for layer, parts in layers.items():
        for kind in KINDS:
            names = tuple(f"{own}{part}.{kind}" for part in parts)
            if all(name in model for name in names):
                # FLUX calls the weight of a norm its scale.
                spelled = "scale" if layer.endswith(("query_norm", "key_norm")) else kind
                yield Rows(f"{original}{layer}.{spelled}", names, swapped=layer == swapped)


def sd3_table(model: ModelMixin) -> list[Rows]:
    """Return the table of an `SD3Transformer2DModel`."""
    names, count = model.state_dict(), model.config["num_layers"]
    table = [
        Rows("pos_embed", ("pos_embed.pos_embed",)),
        *_entries(SD3, names, swapped="final_layer.adaLN_modulation.1"),
    ]
    for index in range(count):
        # The last block reads the text and changes it no more: its norm is one of those that diffusers turns.
        last = "context_block.adaLN_modulation.1" if index == count - 1 else ""
        table += _entries(
            SD3_BLOCK, names, f"joint_blocks.{index}.", f"transformer_blocks.{index}.", swapped=last
        )
    return table


def flux_table(model: ModelMixin) -> list[Rows]:
    """Return the table of a `FluxTransformer2DModel`."""
    names = model.state_dict()
    table = list(_entries(FLUX, names, swapped="final_layer.adaLN_modulation.1"))
    for index in range(model.config["num_layers"]):
        table += _entries(FLUX_DOUBLE, names, f"double_blocks.{index}.", f"transformer_blocks.{index}.")
    for index in range(model.config["num_single_layers"]):
        table += _entries(
            FLUX_SINGLE, names, f"single_blocks.{index}.", f"single_transformer_blocks.{index}."
        )
    return table


# The function that returns the table of a model, by the name of its diffusers class.
TABLES: Mapping[str, Callable[[ModelMixin], list[Rows]]] = {
    "UNet2DConditionModel": unet_table,
    "SD3Transformer2DModel": sd3_table,
    "FluxTransformer2DModel": flux_table,
}
