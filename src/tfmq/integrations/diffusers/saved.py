"""Load what `save_pretrained` wrote, quantized components included."""

from pathlib import Path
from typing import Any

import diffusers

from tfmq.integrations.diffusers.quantizer import register


def load_pipeline(directory: Path) -> diffusers.DiffusionPipeline:
    """Load a pipeline directory."""
    register()
    return diffusers.DiffusionPipeline.from_pretrained(str(directory))


def load_component(directory: Path, class_name: str) -> Any:
    """Load one model of diffusers' class `class_name`.

    Raises:
        ValueError: this diffusers has no such class.
    """
    kind = getattr(diffusers, class_name, None)
    if kind is None:
        raise ValueError(f"{directory} holds a {class_name}, which this diffusers does not have; load it with tfmq.load(directory, module=...)")
    register()
    return kind.from_pretrained(str(directory))
