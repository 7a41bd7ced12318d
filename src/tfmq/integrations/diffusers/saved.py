"""Load what `save_pretrained` wrote, quantized components included."""

from pathlib import Path
from typing import Any

import diffusers

# Imported so that directories which name its pipeline can be opened.
from tfmq.integrations.diffusers import class_conditional  # noqa: F401
from tfmq.integrations.diffusers.heads import UNet2DHeadsModel
from tfmq.integrations.diffusers.precision import in_one_precision
from tfmq.integrations.diffusers.quantizer import register_quantizer
from tfmq.storage.atomic import read_json

OWN = {kind.__name__: kind for kind in (UNet2DHeadsModel,)}


def absent_components(directory: Path) -> dict[str, None]:
    """Return the components that a pipeline was saved without, as `from_pretrained` wants to be told: SD3 may
    go without its T5, for one.
    """
    index = read_json(directory / "model_index.json")
    return {name: None for name, value in index.items() if value == [None, None]}


def load_pipeline(directory: Path) -> diffusers.DiffusionPipeline:
    """Load a pipeline directory."""
    register_quantizer()
    # diffusers opens models in float32, transformers in the precision of their files.
    return in_one_precision(
        diffusers.DiffusionPipeline.from_pretrained(str(directory), **absent_components(directory))
    )


def component_class(name: str) -> Any:
    """Return the model class of tfmq or of diffusers with this name; None if there is none."""
    return OWN.get(name) or getattr(diffusers, name, None)


def load_component(directory: Path, class_name: str) -> Any:
    """Load one model of the class `class_name`.

    Raises:
        ValueError: this diffusers has no such class.
    """
    kind = component_class(class_name)
    if kind is None:
        raise ValueError(
            f"{directory} holds a {class_name}, which this diffusers does not "
            "have; load it with tfmq.load(directory, module=...)"
        )
    register_quantizer()
    return kind.from_pretrained(str(directory))
