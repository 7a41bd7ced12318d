"""The text encoder of Stable Diffusion v1: its configuration is read off the shapes of its weights."""

from collections.abc import Mapping
from typing import Any

from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tfmq.integrations.diffusers.original.fit import fit

# Channels of a head in every published text encoder of CLIP.
HEAD = 64
# Old releases of transformers keep the numbers of the positions in this buffer.
POSITIONS = "embeddings.position_ids"


def text_encoder(tensors: Mapping[str, Tensor], *, tokenizer: str) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """Return the tokenizer, from a directory or a hub id, and the encoder of the checkpoint.

    Raises:
        ValueError: keys do not fit, or there is no such tokenizer.
    """
    converted = {
        name.removeprefix("text_model."): tensor
        for name, tensor in convert_ldm_clip_checkpoint(dict(tensors)).items()
    }
    converted.pop(POSITIONS, None)
    try:
        vocabulary, width = converted["embeddings.token_embedding.weight"].shape
        positions = converted["embeddings.position_embedding.weight"].shape[0]
        inner = converted["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the text encoder of the checkpoint lacks {error.args[0]}") from error
    layers = 1 + max(int(name.split(".")[2]) for name in converted if name.startswith("encoder.layers."))
    try:
        tokens = CLIPTokenizer.from_pretrained(tokenizer)
    except OSError as error:
        raise ValueError(
            f"there is no tokenizer {tokenizer}: {str(error).strip().splitlines()[0]}"
        ) from error
    ids: dict[str, Any] = {
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
    size = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "max_position_embeddings": positions,
    }
    heads = max(1, width // HEAD)
    model = CLIPTextModel(
        CLIPTextConfig(
            **size, **ids, num_hidden_layers=layers, num_attention_heads=heads, hidden_act="quick_gelu"
        )
    )
    original = {name: tensor for name, tensor in tensors.items() if not name.endswith(POSITIONS)}
    # Since release 5.6 of transformers there is no `text_model` between the model and its parts.
    prefix = "text_model." if "text_model" in dict(model.named_children()) else ""
    return tokens, fit(
        model, {f"{prefix}{name}": tensor for name, tensor in converted.items()}, original=original
    )
