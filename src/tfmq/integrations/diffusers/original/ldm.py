"""Latent-diffusion and Stable Diffusion v1 checkpoints: a UNet of `input_blocks`, `middle_block` and
`output_blocks`, and a first stage.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DModel,
    VQModel,
)
from diffusers import UNet2DConditionModel as ConditionalUNet
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from tfmq.integrations.diffusers.class_conditional import ClassEmbedder, LatentClassPipeline
from tfmq.integrations.diffusers.heads import UNet2DHeadsModel
from tfmq.integrations.diffusers.original.clip import text_encoder
from tfmq.integrations.diffusers.original.files import section, tensors_of
from tfmq.integrations.diffusers.original.fit import fit
from tfmq.integrations.diffusers.original.layout import (
    rename_downsamplers,
    take_level_attention,
    take_upsamplers,
)

UNET, FIRST_STAGE, CONDITION = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# Number of groups of the normalisation in the middle block's attention.
GROUPS = 32
UNCONDITIONAL = "__is_unconditional__"


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def choose_weights(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the UNet's weights that the original samples with: the average, kept under flattened names,
    unless `use_ema` is false.

    Raises:
        ValueError: the average lacks weights.
    """
    trained = _below(tensors, UNET)
    averages = _below(tensors, "model_ema.diffusion_model")
    if not averages or not section(config, "model", "params").get("use_ema", True):
        return trained
    flat = {name: "model_ema." + name.removeprefix("model.").replace(".", "") for name in trained}
    missing = sorted(name for name, average in flat.items() if average not in averages)
    if missing:
        raise ValueError(f"the averaged weights in the checkpoint lack {', '.join(missing)}")
    return {name: averages[average] for name, average in flat.items()}


def _refuse(params: Mapping[str, Any], **unsupported: str) -> None:
    for name, reason in unsupported.items():
        if params.get(name):
            raise ValueError(f"{name}: {params[name]} in the configuration cannot be converted: {reason}")


def _shared_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], list[bool]]:
    """Return what both kinds of UNet have in common, and which levels attend."""
    params = section(config, "model", "params", "unet_config", "params")
    widths = tuple(params["model_channels"] * factor for factor in params["channel_mult"])
    shared = {
        "sample_size": section(config, "model", "params", "image_size"),
        "in_channels": params["in_channels"],
        "out_channels": params["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": params["num_res_blocks"],
        "resnet_time_scale_shift": "scale_shift" if params.get("use_scale_shift_norm") else "default",
    }
    return shared, [2**level in params["attention_resolutions"] for level in range(len(widths))]


def _head_width(params: Mapping[str, Any], width: int) -> int:
    """Return the width of a head in an attention of this width."""
    name = "num_heads" if params.get("num_head_channels", -1) == -1 else "num_head_channels"
    quotient, rest = divmod(width, params[name])
    if rest:
        raise ValueError(f"{name}: {params[name]} does not divide {width}, the width of an attention")
    return quotient if name == "num_heads" else int(params[name])


def _unet(params: Mapping[str, Any], widths: set[int], **arguments: Any) -> UNet2DModel:
    """Return a model that attends at these widths: diffusers' own where all heads are as wide as each
    other.
    """
    sizes = {_head_width(params, width) for width in widths}
    if len(sizes) == 1:
        return UNet2DModel(**arguments, attention_head_dim=sizes.pop())
    return UNet2DHeadsModel(**arguments, num_attention_heads=params["num_heads"])


def _self_attention(
    tensors: Mapping[str, Tensor], head_width: Callable[[int], int], *, interleaved: bool
) -> dict[str, Tensor]:
    """Return the tensors of attention blocks by diffusers' names; `qkv` is cut in three, head by head where
    heads are `interleaved`.

    Args:
        tensors: the tensors by the names that diffusers' converter gave them.
        head_width: returns the width of a head, from the width of the attention.
        interleaved: whether rows are ordered by head, then by q, k, v, or the other way around.
    """
    cut: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stem, _, kind = name.rpartition(".")
        if ".attentions." not in name:
            cut[name] = tensor
        elif stem.endswith(".qkv"):
            width = tensor.shape[0] // 3
            parts = tensor.flatten(1) if kind == "weight" else tensor
            rows = parts.unflatten(0, (-1, 3, head_width(width) if interleaved else width))
            for index, letter in enumerate("qkv"):
                cut[f"{stem.removesuffix('.qkv')}.to_{letter}.{kind}"] = rows[:, index].flatten(0, 1)
        else:
            renamed = stem.replace(".norm", ".group_norm").replace(".proj_out", ".to_out.0")
            cut[f"{renamed}.{kind}"] = tensor[:, :, 0] if tensor.ndim == 3 else tensor
    return cut


def unconditional_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> UNet2DModel:
    """Return the UNet of a model without cross-attention."""
    params = section(config, "model", "params", "unet_config", "params")
    shared, attends = _shared_config(config)
    widths = shared["block_out_channels"]
    resampling = bool(params.get("resblock_updown"))
    kind, plain = (
        ("resnet", ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"))
        if resampling
        else ("conv", ("DownBlock2D", "UpBlock2D"))
    )
    kinds = {
        "down_block_types": tuple("AttnDownBlock2D" if attend else plain[0] for attend in attends),
        "up_block_types": tuple("AttnUpBlock2D" if attend else plain[1] for attend in reversed(attends)),
        "downsample_type": kind,
        "upsample_type": kind,
    }
    # The middle block attends too. By default it has no norm where blocks scale and shift.
    attending = {width for width, attend in zip(widths, attends, strict=True) if attend} | {widths[-1]}
    model = _unet(params, attending, **shared, **kinds, attn_norm_num_groups=GROUPS)
    layers = shared["layers_per_block"]
    rest, upsamplers = take_upsamplers(weights, layers) if resampling else (dict(weights), {})
    named = rename_downsamplers(convert_ldm_unet_checkpoint(rest, model.config), layers) | upsamplers
    tensors = _self_attention(
        named, partial(_head_width, params), interleaved=not params.get("use_new_attention_order", False)
    )
    return fit(
        model, tensors, original={name: tensor for name, tensor in weights.items() if ".qkv." not in name}
    )


def conditional_unet(weights: Mapping[str, Tensor], config: Mapping[str, Any]) -> ConditionalUNet:
    """Return the UNet of a model with cross-attention, to a class or to text."""
    params = section(config, "model", "params", "unet_config", "params")
    _refuse(params, resblock_updown="diffusers' blocks with cross-attention resample by convolutions")
    shared, attends = _shared_config(config)
    head = params.get("num_head_channels", -1)
    heads = (
        params["num_heads"] if head == -1 else tuple(width // head for width in shared["block_out_channels"])
    )
    model = ConditionalUNet(
        **shared,
        down_block_types=tuple("CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)),
        # diffusers calls the number of heads `attention_head_dim` here.
        attention_head_dim=heads,
        cross_attention_dim=params["context_dim"],
        transformer_layers_per_block=params.get("transformer_depth", 1),
        use_linear_projection=params.get("use_linear_in_transformer", False),
    )
    return fit(model, convert_ldm_unet_checkpoint(dict(weights), model.config), original=weights)


def first_stage(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> AutoencoderKL | VQModel:
    """Return the autoencoder; the loss that it was trained with is left out."""
    params = section(config, "model", "params", "first_stage_config", "params")
    sizes = section(params, "ddconfig")
    weights = {
        name: tensor
        for name, tensor in _below(tensors, FIRST_STAGE).items()
        if not name.startswith(f"{FIRST_STAGE}loss.")
    }
    levels = len(sizes["ch_mult"])
    attends = [
        sizes["resolution"] // 2**level in sizes.get("attn_resolutions", ()) for level in range(levels)
    ]
    scale = tensors.get("scale_factor", section(config, "model", "params").get("scale_factor", 1.0))
    shared = {
        "in_channels": sizes["in_channels"],
        "out_channels": sizes["out_ch"],
        "down_block_types": tuple(
            "AttnDownEncoderBlock2D" if attend else "DownEncoderBlock2D" for attend in attends
        ),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if attend else "UpDecoderBlock2D" for attend in reversed(attends)
        ),
        "block_out_channels": tuple(sizes["ch"] * factor for factor in sizes["ch_mult"]),
        "layers_per_block": sizes["num_res_blocks"],
        "latent_channels": sizes["z_channels"],
        "sample_size": sizes["resolution"],
        "scaling_factor": float(scale),
    }
    quantized = "n_embed" in params
    if quantized:
        model: AutoencoderKL | VQModel = VQModel(
            **shared, num_vq_embeddings=params["n_embed"], vq_embed_dim=params["embed_dim"]
        )
    else:
        model = AutoencoderKL(**shared)
    rest, attention = take_level_attention(weights, levels)
    converted = convert_ldm_vae_checkpoint(rest, model.config) | attention
    codebook = f"{FIRST_STAGE}quantize.embedding.weight"
    if codebook in weights:
        converted["quantize.embedding.weight"] = weights[codebook]
    return fit(model, converted, original=weights)


def _schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the noise schedule: the original's "linear" is linear in the square root of beta, and its
    timesteps begin at 1.
    """
    params = section(config, "model", "params")
    return {
        "num_train_timesteps": params.get("timesteps", 1000),
        "beta_start": section(config, "model", "params", "linear_start"),
        "beta_end": section(config, "model", "params", "linear_end"),
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "set_alpha_to_one": False,
    }


def convert(states: Any, config: Mapping[str, Any], *, path: Path, tokenizer: str) -> DiffusionPipeline:
    """Return the pipeline of a checkpoint in this layout: unconditional, class-conditional, or text-to-image.

    Raises:
        ValueError: the configuration lacks a field or describes what diffusers cannot compute, or keys do not
            fit; lists them.
    """
    tensors = tensors_of(states, path=path)
    weights, autoencoder = choose_weights(tensors, config), first_stage(tensors, config)
    condition = section(config, "model", "params").get("cond_stage_config", UNCONDITIONAL)
    ddim = DDIMScheduler(**_schedule(config), clip_sample=False)
    if condition == UNCONDITIONAL:
        return LDMPipeline(vqvae=autoencoder, unet=unconditional_unet(weights, config), scheduler=ddim)
    unet = conditional_unet(weights, config)
    target = str(section(condition, "target")).rpartition(".")[2]
    own = _below(tensors, CONDITION)
    if target == "ClassEmbedder":
        embedder = ClassEmbedder(condition["params"].get("n_classes", 1000), condition["params"]["embed_dim"])
        fit(embedder, {name.removeprefix(CONDITION): tensor for name, tensor in own.items()}, original=own)
        return LatentClassPipeline(vqvae=autoencoder, unet=unet, scheduler=ddim, class_embedder=embedder)
    if target != "FrozenCLIPEmbedder":
        raise ValueError(
            f"the condition {target} cannot be converted; ClassEmbedder and FrozenCLIPEmbedder can"
        )
    tokens, encoder = text_encoder(own, tokenizer=tokenizer)
    return StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=encoder,
        tokenizer=tokens,
        unet=unet,
        scheduler=PNDMScheduler(**_schedule(config), skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
