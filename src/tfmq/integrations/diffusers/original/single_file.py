"""A published single file as a pipeline: denoiser, autoencoder and text encoders that it holds, in its own
precision; nothing is downloaded.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from transformers import CLIPTokenizer

from tfmq.integrations.diffusers.opening import component_modules, in_float32
from tfmq.integrations.diffusers.original import encoders
from tfmq.integrations.diffusers.original.families import (
    Encoder,
    Family,
    Prediction,
    denoiser_prefix,
    family_of,
    prediction_of,
)
from tfmq.integrations.diffusers.original.files import ILL_FITTING
from tfmq.integrations.diffusers.original.fit import fit
from tfmq.integrations.diffusers.original.integer import integer_denoiser
from tfmq.integrations.diffusers.original.reading import reader_of
from tfmq.integrations.diffusers.original.rows import from_original
from tfmq.integrations.diffusers.original.stock import lengths_of, placed, stock_denoiser
from tfmq.integrations.diffusers.saved import absent_components
from tfmq.nn.submodules import submodules
from tfmq.quantizers.part import Part
from tfmq.storage.atomic import read_json
from tfmq.storage.directory import PIPELINE_FILE

CLIP = "openai/clip-vit-large-patch14"
VOCABULARIES = ("tokenizer.json", "vocab.json")
AUTOENCODERS = ("first_stage_model.", "vae.")
# Parts of pipelines that no single file has and that no image needs.
UNNEEDED = ("safety_checker", "feature_extractor", "image_encoder")
# What trainings keep beside a model: noise schedules, averages, losses, marks of what is predicted.
KEPT_BESIDE = (
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "denoiser.sigmas",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "model_ema.",
    "posterior_",
    "sqrt_",
    "v_pred",
    "ztsnr",
)


class SingleFile:
    """The tensors of a file, sorted into the parts of a pipeline.

    Raises:
        CheckpointError: it is no safetensors or GGUF file, or a damaged one.
        ValueError: it is of no layout that is read here.
    """

    def __init__(self, path: Path) -> None:
        self.path, reader = path, reader_of(path)
        self.source = {"format": reader.format, "file": path.name}
        self.tensors, layers = reader.read(path)
        with _named(path):
            self.prefix = denoiser_prefix(self.tensors)
            if elsewhere := [name for name in layers if not name.startswith(self.prefix)]:
                raise ValueError(f"{elsewhere[0]} is quantized, which layers of the denoiser alone may be")
            self.layers = {name.removeprefix(self.prefix): layer for name, layer in layers.items()}
            self.denoiser = self.below(self.prefix)
            self.family = family_of(encoders.shapes_of(self.denoiser), self.tensors)

    def below(self, *prefixes: str) -> dict[str, Tensor]:
        """Return the tensors below the first of `prefixes` that has any, without it."""
        for prefix in prefixes:
            found = {
                name.removeprefix(prefix): tensor
                for name, tensor in self.tensors.items()
                if name.startswith(prefix)
            }
            if found:
                return found
        return {}

    def unused(self) -> list[str]:
        """Return the names of tensors that no part of a pipeline has."""
        used = (
            self.prefix,
            *AUTOENCODERS,
            *KEPT_BESIDE,
            *(prefix for encoder in self.family.encoders for prefix in _owned(encoder)),
        )
        return [] if not self.prefix else [name for name in self.tensors if not name.startswith(used)]


def _owned(encoder: Encoder) -> tuple[str, ...]:
    """Return the beginnings of an encoder's names, and of what stands beside them."""
    return tuple(prefix.rpartition(".transformer.")[0] or prefix for prefix in encoder.prefixes)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file where something is wrong with what it holds."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"{path}: the checkpoint lacks {error.args[0]}") from error
    except ValueError as error:
        # Errors of a kind of their own name the file already.
        if type(error) is not ValueError:
            raise
        raise ValueError(f"{path}: {error}") from error
    except ILL_FITTING as error:
        raise ValueError(f"{path}: its tensors are not those of this layout: {error}") from error


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
    found = (try_to_load_from_cache(source, name) for name in VOCABULARIES) if source.count("/") == 1 else ()
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


def _like(family: Family, base: Path) -> dict[str, Any]:
    """Return the configuration of the denoiser of the pipeline in `base`.

    Raises:
        ValueError: it is no pipeline of this family.
        CheckpointError: its index or that configuration cannot be read.
    """
    index = read_json(base / PIPELINE_FILE)
    if index.get(family.component) != ["diffusers", family.denoiser]:
        raise ValueError(f"{base} is no {family.title} pipeline: it has no {family.denoiser}")
    config = read_json(base / family.component / "config.json")
    return {name: value for name, value in config.items() if name != "quantization_config"}


def _given(file: SingleFile, base: Path | None, dtype: torch.dtype) -> dict[str, Any]:
    """Return the parts of the pipeline in `base` that the file does not hold, in `dtype`."""
    if base is None:
        return {}
    family = file.family
    held = [encoder.name for encoder in family.encoders if file.below(*encoder.prefixes)]
    held += ["vae"] if file.below(*AUTOENCODERS) else []
    without = {name: None for name in (family.component, *held)}
    pipeline = DiffusionPipeline.from_pretrained(str(base), **(absent_components(base) | without))
    found = {name: part for name, part in pipeline.components.items() if part is not None}
    for part in found.values():
        if isinstance(part, nn.Module) and not any(submodules(part, Part)):
            part.to(dtype)
    return found


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
    given = _given(file, base, denoiser.dtype)
    with _named(file.path):
        texts = _texts(file, given, tokenizer or CLIP)
        tensors = file.below(*AUTOENCODERS)
        vae = {"vae": encoders.autoencoder(tensors, **family.latents)} if tensors else {}
        predicted = prediction or prediction_of(family, file.denoiser, file.tensors)
        name, fields = family.scheduler(file.tensors, predicted)
        scheduler = {"scheduler": getattr(diffusers, name)(**fields)}
        parts = {**scheduler, **given, **vae, **texts, family.component: denoiser}
        pipeline: DiffusionPipeline = kind(**_complete(kind, family, parts))
    # A pipeline hands tensors from part to part, which do not compute with those of another precision.
    mixed = {part.dtype for part in component_modules(pipeline).values()} != {denoiser.dtype}
    return in_float32(pipeline) if mixed else pipeline


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
        warnings.warn(f"{path}: {len(unused)} tensors are not used, such as {unused[0]}", stacklevel=2)
    like = None if base is None else _like(file.family, base)
    with _named(path):
        denoiser = (
            integer_denoiser(file.family, file.denoiser, file.layers, source=file.source, like=like)
            if file.layers
            else denoiser_of(file.family, file.denoiser, like)
        )
    return pipeline_of(file, denoiser, base=base, tokenizer=tokenizer, prediction=prediction)
