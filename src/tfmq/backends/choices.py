"""Choices that were measured on this machine before: a small file for each model, kind of call and set of
versions.
"""

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from tfmq.backends.caching import cache_directory
from tfmq.storage.atomic import read_json, write_json
from tfmq.storage.errors import CheckpointError
from tfmq.version import __version__

CPUINFO = Path("/proc/cpuinfo")
# The library behind a backend, for backends that need more than torch.
LIBRARIES = {"openvino": "openvino", "cuda": "triton"}


def machine(device: torch.device) -> str:
    """Return the name of the processor, or of the device beside it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def versions(backends: Sequence[str]) -> dict[str, str]:
    """Return the versions of all that decides how fast `backends` are."""
    libraries = sorted(LIBRARIES[name] for name in backends if name in LIBRARIES)
    return {
        "tfmq": __version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in libraries},
    }


@dataclass(frozen=True)
class Choice:
    """Milliseconds of a call by backend, and what those said that failed."""

    milliseconds: Mapping[str, float]
    failed: Mapping[str, str]


class ChoiceFile:
    """The file of one choice, named by the digest of all that it depends on, which is in it too, to read."""

    def __init__(self, depends: Mapping[str, Any]) -> None:
        self.depends = {name: str(value) for name, value in depends.items()}
        text = "\n".join(f"{name}={value}" for name, value in sorted(self.depends.items()))
        self.path = cache_directory("auto") / f"{sha256(text.encode()).hexdigest()[:32]}.json"

    def read(self, backends: Sequence[str]) -> Choice | None:
        """Return the choice among `backends`; None where there is no file, or none that says something of
        each of them.
        """
        try:
            found = read_json(self.path)
        except (CheckpointError, OSError):
            return None
        match found:
            case {"milliseconds": dict(times), "failed": dict(failed)} if times:
                numbers = all(
                    isinstance(time, int | float) and 0 < time < math.inf for time in times.values()
                )
                if numbers and {*times, *failed} == {*backends}:
                    return Choice(times, {name: str(text) for name, text in failed.items()})
        return None

    def write(self, choice: Choice) -> None:
        """Keep the choice; where the disk is full or read-only, this process alone does."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(
                self.path,
                {
                    "depends": self.depends,
                    "milliseconds": dict(choice.milliseconds),
                    "failed": dict(choice.failed),
                },
            )
        except (CheckpointError, OSError):
            return
