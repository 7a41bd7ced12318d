"""From an original checkpoint and its configuration to a pipeline."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from tfmq.integrations.diffusers.original import ddim, ldm
from tfmq.integrations.diffusers.original.files import ILL_FITTING, read_checkpoint, read_config

CLIP = "openai/clip-vit-large-patch14"


def _is_ddim(config: Mapping[str, Any]) -> bool:
    match config:
        case {"diffusion": _, "model": {"ch_mult": _}}:
            return True
    return False


def _is_ldm(config: Mapping[str, Any]) -> bool:
    match config:
        case {"model": {"params": {"unet_config": _}}}:
            return True
    return False


def import_checkpoint(checkpoint: Path, config_file: Path, *, tokenizer: str = CLIP) -> DiffusionPipeline:
    """Return the diffusers pipeline of an original checkpoint.

    Args:
        checkpoint: `.ckpt`, `.pth` or `.safetensors`, with the layout of DDIM, of latent diffusion, or of
            Stable Diffusion v1.
        config_file: the YAML file that came with it.
        tokenizer: directory or hub id of the tokenizer, which a text-to-image checkpoint does not hold.

    Raises:
        ValueError: a file cannot be read, the layout is none of these, or keys do not fit; lists them.
    """
    config = read_config(config_file)
    if not (_is_ddim(config) or _is_ldm(config)):
        raise ValueError(
            f"{config_file} describes neither a DDIM model (model.ch_mult, diffusion) "
            "nor latent diffusion (model.params.unet_config)"
        )
    states = read_checkpoint(checkpoint)
    try:
        if _is_ddim(config):
            return ddim.convert(states, config, path=checkpoint)
        return ldm.convert(states, config, path=checkpoint, tokenizer=tokenizer)
    except KeyError as error:
        raise ValueError(f"{config_file} lacks {error.args[0]}") from error
    except ValueError as error:
        raise ValueError(f"{checkpoint} with {config_file}: {error}") from error
    except ILL_FITTING as error:
        raise ValueError(
            f"{config_file} has a value of another kind than the originals have: {error}"
        ) from error
