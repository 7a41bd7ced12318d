"""Autoencoders and text encoders of the published single files, in the dtype of the file."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tfmq.integrations.diffusers.original import sizes
from tfmq.integrations.diffusers.original.fit import fit

Tensors = Mapping[str, Tensor]
# What the originals keep beside the weights of their encoders.
BESIDE = ("logit_scale", "position_ids", "attn_mask")
HALVES = (torch.float16, torch.bfloat16)
# Numbers of these kinds are exact in either half precision.
NARROW = (torch.float8_e4m3fn, torch.float8_e5m2)


def common_dtype(tensors: Tensors) -> torch.dtype:
    """Return the narrowest dtype of float16, bfloat16 and float32 that has the values of all tensors."""
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} - {*NARROW}
    if not found:
        return torch.float16
    return found.pop() if len(found) == 1 and found <= {*HALVES} else torch.float32


def in_common_dtype(tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors in their common dtype.

    Raises:
        ValueError: one is not of floating point.
    """
    dtype = common_dtype(tensors)
    if strange := [name for name, tensor in tensors.items() if not tensor.is_floating_point()]:
        raise ValueError(f"{strange[0]} is {tensors[strange[0]].dtype}, not floating point")
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def shapes_of(tensors: Tensors) -> sizes.Shapes:
    """Return the shapes of tensors by name."""
    return {name: tensor.shape for name, tensor in tensors.items()}


def filled(
    kind: Callable[[Any], Any], config: Any, tensors: Tensors, *, original: Tensors | None = None
) -> Any:
    """Return a model that has these tensors, in their common dtype."""
    with init_empty_weights():
        model = kind(config)
    kept = dict(tensors)
    if original is not None:
        # Casting makes copies, so that first compare what went where.
        fit(model, kept, original=original, assign=True)
    return fit(model, in_common_dtype(kept), assign=True)


def autoencoder(tensors: Tensors, **factors: float | int | None) -> AutoencoderKL:
    """Return the autoencoder of tensors with the original names; `factors` are those of its latents.

    Raises:
        ValueError: keys do not fit.
    """
    config = sizes.autoencoder(shapes_of(tensors)) | factors
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(("loss.", "model_ema."))}
    # The prefix keeps diffusers from taking a part of a name, such as `vae.`, for one.
    spelled = {f"first_stage_model.{name}": tensor for name, tensor in kept.items()}
    converted = convert_ldm_vae_checkpoint(spelled, config)
    return filled(AutoencoderKL.from_config, config, converted, original=kept)


def _without_extras(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(BESIDE)}


def clip(tensors: Tensors, tokenizer: Any, *, projected: bool, activation: str) -> Any:
    """Return a CLIP text encoder of tensors with the names of transformers; `projected` is one with a
    projection, which is the identity where the file has none.

    Raises:
        ValueError: keys do not fit.
    """
    kept = _without_extras(tensors)
    if "embeddings.token_embedding.weight" in kept:  # Older files have no `text_model` in their names.
        kept = {f"text_model.{name}": tensor for name, tensor in kept.items()}
    config = sizes.clip(shapes_of(kept)) | {"hidden_act": activation}
    if tokenizer is not None:
        # The encoder looks for the end of a text by its number.
        config |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if projected and "text_projection.weight" not in kept:
        config["projection_dim"] = config["hidden_size"]
        kept["text_projection.weight"] = torch.eye(config["hidden_size"], dtype=common_dtype(kept))
    if not projected:
        kept.pop("text_projection.weight", None)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    with init_empty_weights():
        expected = kind(CLIPTextConfig(**config)).state_dict()
    # Since release 5.6 of transformers there is no `text_model` between the model and its parts.
    flat = not any(name.startswith("text_model.") for name in expected)
    renamed = {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in kept.items()}
    return filled(kind, CLIPTextConfig(**config), renamed)


class _Sized:
    """What diffusers' converter asks of a text model: the width of its configuration."""

    def __init__(self, width: int) -> None:
        self.config = self
        self.hidden_size = width


def open_clip(tensors: Tensors, tokenizer: Any, *, projected: bool) -> Any:
    """Return a text encoder of tensors with the names of OpenCLIP. One that is not `projected` ends before
    its last layer, as Stable Diffusion 2 reads it.

    Raises:
        ValueError: keys do not fit.
    """
    kept = _without_extras(tensors)
    width = sizes.shape_of(shapes_of(kept), "token_embedding.weight", 2)[1]
    if not projected:
        last = f"transformer.resblocks.{sizes.count(kept, 'transformer.resblocks.') - 1}."
        left = ("text_projection", last)
        kept = {name: tensor for name, tensor in kept.items() if not name.startswith(left)}
    converted = convert_open_clip_checkpoint(_Sized(width), kept, prefix="")
    return clip(converted, tokenizer, projected=projected, activation="gelu")


def t5(tensors: Tensors) -> Any:
    """Return the encoder of T5 1.1 of tensors with the names of transformers.

    Raises:
        ValueError: keys do not fit.
    """
    kept = dict(tensors)
    config = T5Config(**sizes.t5(shapes_of(kept)))
    kept["encoder.embed_tokens.weight"] = kept["shared.weight"]
    model = filled(T5EncoderModel, config, kept)
    model.tie_weights()
    return model
