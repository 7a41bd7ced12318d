"""Small random models in the layouts of the published single files, written key for key."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tfmq.integrations.diffusers.original.rows import to_original
from tfmq.integrations.diffusers.original.tables import TABLES

diffusers = pytest.importorskip("diffusers")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VAE = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 32}
ENDS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
}
DEEP = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
}
_VAE_NAMES = (
    (r"\.up_blocks\.(\d)\.", lambda found: f".up.{1 - int(found[1])}."),
    (r"\.down_blocks\.", ".down."),
    (r"\.resnets\.(\d)\.", r".block.\1."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.mid_block\.block\.(\d)\.", lambda found: f".mid.block_{int(found[1]) + 1}."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_([qkv])\.", r"attn_1.\1."),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
)
_OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("layer_norm", "ln_"),
    (".fc1.", ".c_fc."),
    (".fc2.", ".c_proj."),
    (".self_attn.", ".attn."),
    ("final_ln_.", "ln_final."),
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)


def drawn(model: Any, seed: int) -> Any:
    """Return a model with other weights than its constructor's, none of which is left at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 / max(1, parameter[0].numel()) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
    return model.eval()


def tokenizer(directory: Path, **arguments: Any) -> Any:
    """Return a tokenizer of letters."""
    from transformers import CLIPTokenizer

    tokens = [*LETTERS, "!", *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({token: place for place, token in enumerate(tokens)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    files = str(directory / "vocab.json"), str(directory / "merges.txt")
    made = CLIPTokenizer(*files, model_max_length=8, **arguments)
    made.save_pretrained(str(directory))
    return made


def t5_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in LETTERS)]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return T5TokenizerFast(tokenizer_object=made, extra_ids=0)


def text(tokens: Any, *, projected: bool = False, layers: int = 2, activation: str = "quick_gelu") -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=1,
        max_position_embeddings=8,
        projection_dim=64,
        hidden_act=activation,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    return drawn((CLIPTextModelWithProjection if projected else CLIPTextModel)(config), 3)


def t5() -> Any:
    from transformers import T5Config, T5EncoderModel

    size = {"vocab_size": 32, "d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return drawn(T5EncoderModel(T5Config(**size, feed_forward_proj="gated-gelu")), 4)


def autoencoder(channels: int, **factors: Any) -> Any:
    ends = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return drawn(diffusers.AutoencoderKL(**VAE, **ends, latent_channels=channels, **factors), 5)


def unet(**config: Any) -> Any:
    made = diffusers.UNet2DConditionModel(
        **{"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (64, 128), **config}
    )
    return drawn(made, 6)


def vae_names(vae: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of an autoencoder by their original names; attention is 1x1 convolutions there."""
    found = {}
    for name, tensor in vae.state_dict().items():
        original = f".{name}"
        for pattern, replacement in _VAE_NAMES:
            original = re.sub(pattern, replacement, original)
        pointwise = ".attn_1." in original and original.endswith("weight") and tensor.ndim == 2
        found[original[1:]] = tensor[:, :, None, None] if pointwise else tensor
    return found


def flat(encoder: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a text encoder by the names of transformers of that time."""
    return {
        name if name.startswith("text_projection") else f"text_model.{name}": tensor
        for name, tensor in flat(encoder).items()
    } | {"text_model.embeddings.position_ids": torch.arange(8)[None]}


def open_clip_names(encoder: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a text encoder by the names of OpenCLIP, which keeps q, k and v together."""
    found: dict[str, Tensor] = {"logit_scale": torch.tensor(4.6)}
    for name, tensor in flat(encoder).items():
        original = name
        for own, other in _OPEN_CLIP:
            original = original.replace(own, other)
        if (cut := re.match(r"(.*)\.([qkv])_proj\.(weight|bias)", original)) is None:
            found[original] = tensor
        elif cut[2] == "q":
            parts = [flat(encoder)[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            found[f"{cut[1]}.in_proj_{cut[3]}"] = torch.cat(parts)
    if "text_projection.weight" in found:
        found["text_projection"] = found.pop("text_projection.weight").T.contiguous()
    return found


def denoiser_names(model: Any) -> dict[str, Tensor]:
    return to_original(model.state_dict(), TABLES[type(model).__name__](model))


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.contiguous() for name, tensor in tensors.items()}


def stable_diffusion(
    folder: Path, *, second: bool = False, channels: int = 4
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the parts of Stable Diffusion 1 or 2, and the tensors of their file."""
    sizes = (
        {"use_linear_projection": True, "attention_head_dim": (1, 2), **DEEP}
        if second
        else {"block_out_channels": (32, 64), "attention_head_dim": 8, **ENDS}
    )
    tokens = tokenizer(folder / "tokenizer")
    layers = 3 if second else 2
    encoder = text(tokens, layers=layers, activation="gelu" if second else "quick_gelu")
    parts = {
        "unet": unet(cross_attention_dim=64, in_channels=channels, **sizes),
        "vae": autoencoder(4),
        "text_encoder": encoder,
    }
    schedule = {"alphas_cumprod": torch.ones(3), "betas": torch.ones(3), "model_ema.decay": torch.ones(())}
    if second:
        texts = below(
            "cond_stage_model.model.", open_clip_names(encoder) | {"text_projection": torch.ones(64, 64)}
        )
        # The file holds a layer more than the pipeline computes.
        last = {name: t for name, t in texts.items() if ".resblocks.2." in name}
        assert last
        parts["text_encoder"] = text(tokens, layers=2, activation="gelu")
        parts["text_encoder"].load_state_dict(
            {name: encoder.state_dict()[name] for name in parts["text_encoder"].state_dict()}
        )
    else:
        texts = below("cond_stage_model.transformer.", clip_names(encoder))
    return parts, {
        **below("model.diffusion_model.", denoiser_names(parts["unet"])),
        **below("first_stage_model.", vae_names(parts["vae"])),
        **texts,
        **schedule,
    }


def sdxl(folder: Path, *, channels: int = 4) -> tuple[dict[str, Any], dict[str, Tensor]]:
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 64,
        "transformer_layers_per_block": (1, 2),
    }
    tokens = tokenizer(folder / "tokenizer")
    parts = {
        "unet": unet(
            cross_attention_dim=128,
            in_channels=channels,
            use_linear_projection=True,
            attention_head_dim=(1, 2),
            **added,
            **DEEP,
        ),
        "vae": autoencoder(4),
        "text_encoder": text(tokens),
        "text_encoder_2": text(tokens, projected=True, activation="gelu"),
    }
    return parts, {
        **below("model.diffusion_model.", denoiser_names(parts["unet"])),
        **below("first_stage_model.", vae_names(parts["vae"])),
        **below("conditioner.embedders.0.transformer.", clip_names(parts["text_encoder"])),
        **below("conditioner.embedders.1.model.", open_clip_names(parts["text_encoder_2"])),
    }


def sd3(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=3,
        attention_head_dim=64,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=128,
        pooled_projection_dim=128,
        out_channels=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    tokens = tokenizer(folder / "tokenizer")
    parts = {
        "transformer": drawn(transformer, 7),
        "vae": autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        "text_encoder": text(tokens, projected=True),
        "text_encoder_2": text(tokens, projected=True, activation="gelu"),
        "text_encoder_3": t5(),
    }
    return parts, {
        **below("model.diffusion_model.", denoiser_names(parts["transformer"])),
        **below("first_stage_model.", vae_names(parts["vae"])),
        **below("text_encoders.clip_l.transformer.", clip_names(parts["text_encoder"])),
        **below("text_encoders.clip_g.transformer.", clip_names(parts["text_encoder_2"])),
        **below("text_encoders.t5xxl.transformer.", t5_names(parts["text_encoder_3"])),
        "text_encoders.clip_l.logit_scale": torch.tensor(4.6),
    }


def t5_names(encoder: nn.Module) -> dict[str, Tensor]:
    state = encoder.state_dict()
    return {name: tensor for name, tensor in state.items() if name != "encoder.embed_tokens.weight"}


def flux(folder: Path, *, prefix: str = "") -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return FLUX.1: its files hold the transformer alone, or all parts below names."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=True,
    )
    tokens = tokenizer(folder / "tokenizer")
    parts = {
        "transformer": drawn(transformer, 8),
        "vae": autoencoder(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        "text_encoder": text(tokens),
        "text_encoder_2": t5(),
    }
    whole = {
        **below("vae.", vae_names(parts["vae"])),
        **below("text_encoders.clip_l.transformer.", clip_names(parts["text_encoder"])),
        **below("text_encoders.t5xxl.transformer.", t5_names(parts["text_encoder_2"])),
    }
    return parts, {**below(prefix, denoiser_names(parts["transformer"])), **(whole if prefix else {})}


def flux_base(folder: Path, parts: Mapping[str, Any]) -> Path:
    """Write a pipeline of FLUX.1 that has all parts, and return its directory."""
    pipeline = diffusers.FluxPipeline(
        **parts,
        tokenizer=tokenizer(folder / "tokenizer"),
        tokenizer_2=t5_tokenizer(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5, use_dynamic_shifting=True),
    )
    pipeline.save_pretrained(str(folder / "base"))
    return folder / "base"
