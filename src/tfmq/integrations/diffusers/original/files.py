"""Read an original checkpoint and its configuration without running anything that they contain."""

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# The error that torch.load raises for a file with more than tensors and plain values. It has no public name
# but in the pickle module.
from torch._weights_only_unpickler import UnpicklingError  # type: ignore[attr-defined]

from tfmq.errors import require, shown
from tfmq.storage.atomic import read_tensors

# Errors that a value of the wrong kind leads to: text for a number, a number for a list, a negative width.
ILL_FITTING = (TypeError, AttributeError, IndexError, ZeroDivisionError, RuntimeError)
# Other errors that torch.load raises where bytes are missing or changed.
DAMAGED = (OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, struct.error)


def read_config(path: Path) -> dict[str, Any]:
    """Return a YAML configuration. Needs the `cli` extra.

    Raises:
        ValueError: the file is missing, is not YAML, or is no mapping.
    """
    yaml = require("yaml", extra="cli")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is no configuration: it holds a {type(values).__name__}, not a mapping")
    return values


class LeftOut:
    """Stands where a checkpoint names a class or a function that is not torch's: it takes whatever it is
    given, and does nothing.
    """

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take what the original would be made of."""

    def __setstate__(self, state: Any) -> None:
        """Take what the original would hold."""


def _foreign_names(path: Path) -> list[str]:
    """Return the classes and functions that a torch file names beside torch's own; checkpoints of trainings
    name callbacks.
    """
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (UnpicklingError, *DAMAGED):
        # The file is old or damaged; `torch.load` will say more.
        return []


def _check_stored(path: Path) -> None:
    """Check that a torch file is no larger in memory than on disk: torch compresses nothing, and a compressed
    file of a megabyte can hold gigabytes.

    Raises:
        ValueError: a part of it is compressed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):
        # A file of an older torch, or a damaged one: `torch.load` will say more.
        return
    if packed := [part.filename for part in parts if part.compress_type != zipfile.ZIP_STORED]:
        raise ValueError(
            f"{path} is compressed ({shown(packed[0])}), which torch does not do; save it as .safetensors"
        )


def read_checkpoint(path: Path) -> Any:
    """Return what a checkpoint holds: the tensors of a `.safetensors` file, or the tensors, lists and
    mappings of a torch file.

    Nothing that a file names is imported or called: objects of foreign classes, such as the callbacks of the
    training that the released Stable Diffusion files hold, are left out.

    Raises:
        ValueError: the file is missing or damaged, or its objects are made by more than classes and their
            state.
        CheckpointError: the same of a `.safetensors` file.
    """
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    _check_stored(path)
    try:
        with torch.serialization.safe_globals([(LeftOut, name) for name in _foreign_names(path)]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        reason = "holds Python objects that could run code (save its tensors as .safetensors), or is damaged"
        raise ValueError(f"{path} {reason}") from error
    except DAMAGED as error:
        raise ValueError(
            f"cannot read the checkpoint {path}: {' '.join(str(error).split()[:40]) or 'it ends too early'}"
        ) from error


def tensors_of(states: Any, *, path: Path) -> dict[str, Tensor]:
    """Return `states` where it maps names to tensors, by itself or under `state_dict`; values that are no
    tensors are left out.

    Raises:
        ValueError: it does not.
    """
    match states:
        case {"state_dict": Mapping() as inner}:
            states = inner
    named = states.items() if isinstance(states, Mapping) else ()
    tensors = {str(name): value for name, value in named if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(
            f"{path} holds a {type(states).__name__} without named tensors; it is no model checkpoint"
        )
    return tensors


def section(config: Mapping[str, Any], *names: str) -> Any:
    """Return the value of a nested configuration.

    Raises:
        ValueError: it lacks one; names the whole path.
    """
    value: Any = config
    for name in names:
        if not isinstance(value, Mapping) or name not in value:
            raise ValueError(f"the configuration has no {'.'.join(names)}")
        value = value[name]
    return value
