"""What backends keep on disk of what they made for this machine: where, and under which key."""

import json
import os
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from tfmq.nn.structure import describe
from tfmq.quantizers.part import Execution
from tfmq.storage.digest import module_digest

CACHE = "TFMQ_CACHE"


def cache_directory(name: str) -> Path:
    """Return a backend's own folder in `$TFMQ_CACHE`, or in `tfmq` in the user's cache directory."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(home) / "tfmq") / name


def model_key(module: nn.Module) -> str:
    """Return the SHA-256, as 64 hex digits, of what a quantized model computes with: its tensors, its
    structure and its configuration. The same tensors may be read by layers of other kinds, as inputs on the
    grid of each token leave no tensor behind.

    Raises:
        ValueError: a tensor has no values here, as while a model is offloaded.
    """
    parts = [module_digest(module), json.dumps(describe(module), sort_keys=True), *_printed(module, "")]
    return sha256("\n".join([*parts, repr(_configuration(module))]).encode()).hexdigest()


def _printed(module: nn.Module, name: str) -> Iterator[str]:
    """Yield what each module below `module` prints of itself, but for what a backend has put there."""
    yield f"{name}: {type(module).__qualname__}({module.extra_repr()})"
    for key, child in module.named_children():
        if not isinstance(child, Execution):
            yield from _printed(child, f"{name}.{key}")


def _configuration(module: nn.Module) -> list[tuple[str, Any]]:
    """Return the settings of a model that has a configuration, but for its manifest and notes."""
    config: Any = getattr(module, "config", {})
    values = config if isinstance(config, Mapping) else config.to_dict() if hasattr(config, "to_dict") else {}
    return sorted(
        (name, value)
        for name, value in values.items()
        if not name.startswith("_") and name != "quantization_config"
    )
