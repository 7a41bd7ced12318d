"""What a diffusers model is apart from its weights: its stock architecture, and the manifest that a quantized
one carries.
"""

import json
import sys
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn

from tfmq.storage.checkpoint import seal
from tfmq.storage.directory import METHOD
from tfmq.version import __version__

QUANTIZATION = "quantization_config"


def stock_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a model had before it was quantized: the first one that its own Python module
    knows by its name.

    Raises:
        ValueError: not a diffusers model.
    """
    for kind in type(module).__mro__:
        if (
            issubclass(kind, ModelMixin)
            and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind
        ):
            return kind
    raise ValueError(
        f"{type(module).__name__} is no diffusers model, so its "
        "architecture cannot be rebuilt from a configuration"
    )


def stock_architecture(module: Any) -> nn.Module:
    """Return the full-precision architecture of a quantized diffusers model, on the meta device: shapes and
    no values.
    """
    config = {
        name: value
        for name, value in module.config.items()
        if name != QUANTIZATION and not name.startswith("_")
    }
    with torch.device("meta"):
        stock: nn.Module = stock_class(module).from_config(config)  # type: ignore[attr-defined]
    return stock


def configuration(module: nn.Module) -> dict[str, Any]:
    """Return the architecture of a diffusers model as its `config.json` has it, without the manifest and
    notes of diffusers; {} for other modules.
    """
    if not isinstance(module, ModelMixin):
        return {}
    stored = json.loads(module.to_json_string())
    return {
        name: value for name, value in stored.items() if name != QUANTIZATION and not name.startswith("_")
    }


def uncalibrated_manifest(
    model: nn.Module, structure: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the sealed manifest of a model that was quantized without a job; `provenance` says how."""
    versions = {"tfmq": __version__, "torch": torch.__version__}
    fields = {"quant_method": METHOD, "structure": structure, "provenance": {**provenance, **versions}}
    return seal(model.state_dict(), fields | {"architecture": configuration(model)}, table=False)


def manifest_of(module: nn.Module) -> Mapping[str, Any] | None:
    """Return the manifest of a quantized diffusers model; None for any other module."""
    config = getattr(module, "config", None)
    quantization = config.get(QUANTIZATION) if isinstance(config, Mapping) else None
    if quantization is None or isinstance(quantization, Mapping):
        return quantization
    manifest: Mapping[str, Any] = quantization.to_dict()
    return manifest
