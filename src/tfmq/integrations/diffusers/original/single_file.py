"""A published single file as a pipeline: denoiser, autoencoder and text encoders that it holds, in its own
precision; nothing is downloaded.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import try_to_load_from_cache
from torch import Tensor
from transformers import CLIPTokenizer

from tfmq.integrations.diffusers.original import encoders
from tfmq.integrations.diffusers.original.base import check_texts, given_parts, like, scheduler_of
from tfmq.integrations.diffusers.original.families import (
    Encoder,
    Family,
    Prediction,
)
from tfmq.integrations.diffusers.original.file_parts import AUTOENCODERS, SingleFile, named_file
from tfmq.integrations.diffusers.original.fit import fit
from tfmq.integrations.diffusers.original.integer import integer_denoiser
from tfmq.integrations.diffusers.original.rows import from_original
from tfmq.integrations.diffusers.original.stock import lengths_of, placed, stock_denoiser
from tfmq.integrations.diffusers.precision import in_one_precision

CLIP = "openai/clip-vit-large-patch14"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
VOCABULARIES = ("tokenizer.json", "vocab.json")
# Parts of pipelines that no single file has and that no image needs.
UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")


def denoiser_of(
    family: Family, tensors: Mapping[str, Tensor], like: Mapping[str, Any] | None = None
) -> ModelMixin:
    """Return the denoiser of a family with its original `tensors`; `like` as in `stock_denoiser`.

    Raises:
        ValueError: keys do not fit; lists them.
    """
    model = stock_denoiser(family, tensors, like)
    converted = from_original(tensors, placed(family, model, tensors), lengths_of(model))
    fitted: ModelMixin = fit(model, encoders.in_common_dtype(converted), assign=True)
    return fitted


def _tokenizer(encoder: Encoder, source: str) -> CLIPTokenizer:
    """Return the tokenizer of a CLIP, from a directory or from what the cache of the hub has of an id.

    Raises:
        ValueError: there is none.
    """
    cached = None
    # An id of the hub is two names with a slash between, which a path may be too.
    if HUB_ID.fullmatch(source) and not Path(source).is_dir():
        found = (try_to_load_from_cache(source, name) for name in VOCABULARIES)
        cached = next((Path(path).parent for path in found if isinstance(path, str)), None)
    directory = cached or Path(source)
    # Without a vocabulary transformers builds a tokenizer that knows nothing.
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise ValueError(
            f"there is no tokenizer in {source}, and no single file holds one: pass the directory of one "
            f"(tfmq import --tokenizer), or of a pipeline that has one (tfmq import --base)"
        )
    padded = {"pad_token": encoder.padded} if encoder.padded else {}
    return CLIPTokenizer.from_pretrained(str(directory), **padded)


def _texts(file: SingleFile, given: Mapping[str, Any], tokenizer: str) -> dict[str, Any]:
    """Return the text encoders that the file holds, and the tokenizers of those that are CLIPs."""
    parts: dict[str, Any] = {}
    for encoder in file.family.encoders:
        tensors = file.below(*encoder.prefixes)
        if tensors and encoder.style == "t5":
            parts[encoder.name] = encoders.t5(tensors)
        elif tensors:
            tokens = given.get(encoder.tokenizer) or _tokenizer(encoder, tokenizer)
            parts[encoder.tokenizer] = tokens
            parts[encoder.name] = (
                encoders.open_clip(tensors, tokens, projected=encoder.projected)
                if encoder.style == "open_clip"
                else encoders.clip(
                    tensors, tokens, projected=encoder.projected, activation=encoder.activation
                )
            )
    return parts


def pipeline_of(
    file: SingleFile,
    denoiser: ModelMixin,
    *,
    base: Path | None = None,
    tokenizer: str | None = None,
    prediction: Prediction | None = None,
) -> DiffusionPipeline:
    """Return the pipeline of a file around its `denoiser`; see `open_single_file`."""
    family, channels = file.family, denoiser.config["in_channels"]
    if channels not in family.pipelines:
        known = ", ".join(map(str, family.pipelines))
        raise ValueError(f"{file.path}: {channels} input channels; {family.title} is read with {known}")
    kind = getattr(diffusers, family.pipelines[channels])
    given = given_parts(file, base, denoiser.dtype)
    with named_file(file.path):
        texts = _texts(file, given, tokenizer or CLIP)
        tensors = file.below(*AUTOENCODERS)
        vae = {"vae": encoders.autoencoder(tensors, **family.latents)} if tensors else {}
        scheduler = {"scheduler": scheduler_of(file, given.get("scheduler"), prediction)}
        parts = {**given, **scheduler, **vae, **texts, family.component: denoiser}
        pipeline: DiffusionPipeline = kind(**_complete(kind, family, parts))
    return in_one_precision(pipeline)


def _complete(kind: Any, family: Family, parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a pipeline.

    Raises:
        ValueError: a part is missing that it cannot go without; names them.
    """
    needed, flags = kind._get_signature_keys(kind)
    texts = {encoder.name: encoder.tokenizer for encoder in family.encoders}
    # A pipeline calls every encoder that it has, with the tokens of its own tokenizer.
    may_lack = {*UNNEEDED, *(name for name in family.optional if name not in parts)}
    may_lack -= {texts[name] for name in texts if name in parts}
    missing = sorted(name for name in needed if name not in parts and name not in may_lack)
    if missing:
        raise ValueError(
            f"the file holds no {', '.join(missing)}: pass the directory of a {family.title} pipeline that "
            f"has them (tfmq import --base), such as a copy of {family.published}"
        )
    checker = {"requires_safety_checker": False} if "requires_safety_checker" in flags else {}
    return {name: parts.get(name) for name in needed} | checker


def open_single_file(
    path: Path,
    *,
    base: Path | None = None,
    tokenizer: str | None = None,
    prediction: Prediction | None = None,
) -> DiffusionPipeline:
    """Return the pipeline of a published single file: Stable Diffusion 1.x, 2.x, XL and 3, or FLUX.1.

    All parts have the precision of their tensors where it is one half precision, else float32. A denoiser
    with layers of int8, as ComfyUI stores them, or with blocks of GGUF comes out quantized, with the codes,
    scales and rotations of the file; float8 becomes floating point. Of the weights that are averaged beside
    the others nothing is taken, as stock loaders do.

    Args:
        path: a `.safetensors` or `.gguf` file.
        base: directory of a pipeline of the same family, for the parts that the file does not hold, and for
            what the shapes of a denoiser's tensors do not say, such as the number of heads.
        tokenizer: directory or hub id of CLIP's tokenizer, where `base` has none; by default that of the hub,
            which its cache holds once it was used.
        prediction: what a UNet predicts, where the file does not show it.

    Raises:
        CheckpointError: a damaged or foreign file.
        ValueError: the layout is none of these, keys do not fit, or a part is missing; names it.
    """
    file = SingleFile(path)
    if unused := file.unused():
        warnings.warn(f"{path}: {len(unused)} of its tensors not used, such as {unused[0]}", stacklevel=2)
    config = None if base is None else like(file.family, base)
    with named_file(path):
        denoiser = (
            integer_denoiser(file.family, file.denoiser, file.layers, source=file.source, like=config)
            if file.layers
            else denoiser_of(file.family, file.denoiser, config)
        )
    if base is not None and config is not None:
        check_texts(file, denoiser, config, base)
    return pipeline_of(file, denoiser, base=base, tokenizer=tokenizer, prediction=prediction)
