"""What a pipeline of the same family gives to a published single file: the parts that the file does not hold,
and what no shape of a tensor says.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from tfmq.errors import shown
from tfmq.integrations.diffusers.original import families
from tfmq.integrations.diffusers.original.families import SD2, Family, Prediction, prediction_of
from tfmq.integrations.diffusers.original.file_parts import AUTOENCODERS, SingleFile
from tfmq.integrations.diffusers.saved import absent_components
from tfmq.nn.submodules import submodules
from tfmq.quantizers.part import Part
from tfmq.storage.atomic import read_json
from tfmq.storage.directory import PIPELINE_FILE


def like(family: Family, base: Path) -> dict[str, Any]:
    """Return the configuration of the denoiser of the pipeline in `base`.

    Raises:
        ValueError: it is no pipeline of this family.
        CheckpointError: its index or that configuration cannot be read.
    """
    index = read_json(base / PIPELINE_FILE)
    if index.get(family.component) != ["diffusers", family.denoiser]:
        raise ValueError(f"{base} is no {family.title} pipeline: it has no {family.denoiser}")
    texts = {name for name in index if name.startswith("text_encoder")}
    own = {encoder.name for encoder in family.encoders}
    if strange := sorted((texts ^ own) - {*family.optional}):
        has = "has a" if strange[0] in texts else "has no"
        raise ValueError(f"{base} is no {family.title} pipeline: it {has} {strange[0]}")
    config = read_json(base / family.component / "config.json")
    return {name: value for name, value in config.items() if name != "quantization_config"}


def check_texts(file: SingleFile, denoiser: ModelMixin, config: Mapping[str, Any], base: Path) -> None:
    """Refuse a base whose denoiser reads texts of another width: its encoders and its schedule are those of
    another family.
    """
    for name in ("cross_attention_dim", "joint_attention_dim"):
        read, given = denoiser.config.get(name), config.get(name)
        if None not in (read, given) and read != given:
            raise ValueError(
                f"{base} is no pipeline for {file.path}: its denoiser reads texts of width {shown(given)}, "
                f"the file's of width {read}"
            )


def scheduler_of(file: SingleFile, given: Any, prediction: Prediction | None) -> Any:
    """Return the scheduler that is `given`, with the settings of the family where the file or the caller says
    otherwise; without one that of the family.
    """
    family = file.family
    told = prediction_of(family, file.denoiser, file.tensors)
    name, fields = family.scheduler(file.tensors, prediction or told)
    if given is None:
        return getattr(diffusers, name)(**fields)
    marks = family.shown(file.tensors) | ({"prediction_type": prediction} if prediction else {})
    if any(given.config.get(key, value) != value for key, value in marks.items()):
        return type(given).from_config(given.config, **fields)
    kept = given.config.get("prediction_type")
    telling = family is SD2 and families.DEEP in file.denoiser and prediction is None
    if telling and kept not in (None, told):
        warnings.warn(
            f"{file.path} looks like one that predicts {told}, and the scheduler of the base is for {kept}: "
            "tfmq import --prediction decides",
            stacklevel=2,
        )
    return given


def given_parts(file: SingleFile, base: Path | None, dtype: torch.dtype) -> dict[str, Any]:
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
