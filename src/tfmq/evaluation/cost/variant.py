"""One way to compute a denoiser's step: the contract, and the registry of all."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from torch import Tensor, nn

from tfmq.evaluation.cost.source import Source
from tfmq.models.denoiser import Inputs

Kind = Literal["backend", "peer"]
Step = Callable[[Inputs], Tensor]

# What pip calls a package that is imported by another name.
DISTRIBUTIONS = {"optimum.quanto": "optimum-quanto"}
BASE = "fp32"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a variant is prepared for: models and calls, a folder of its own for files, the rows of each call,
    and threads.

    `device` is where variants run that are torch's; other libraries stay on the CPU.
    """

    source: Source
    folder: Path
    batch: int
    threads: int
    device: str = "cpu"

    def calls(self) -> list[Inputs]:
        """Return the calls that libraries calibrate on, and that accuracy is measured on."""
        return self.source.calls(self.batch)


def placed(module: nn.Module, setting: Setting) -> Step:
    """Move a model to the setting's device and return its step, which waits for the device: the output comes
    back to the host.
    """
    denoiser = setting.source.view(module.to(setting.device))
    return lambda call: denoiser(call).cpu()


@dataclass(frozen=True)
class PreparedStep:
    """A step that can be called, and the bytes that the model behind it takes on disk."""

    step: Step
    disk_bytes: int


class Variant(Protocol):
    """A way to compute the step.

    `needs` are the modules that must be importable. `build` writes what `prepare` reads, in a process of its
    own; a variant without files of its own does nothing there. `prepare` loads the model for calls of exactly
    `setting.batch` rows. A variant that `caches` keeps what its first start made (a converted or compiled
    model) for later starts.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the modules that must be importable."""

    @property
    def builds(self) -> bool:
        """Whether `build` writes files."""

    @property
    def caches(self) -> bool:
        """Whether a first start leaves something that makes later starts faster."""

    def build(self, setting: Setting) -> None:
        """Write what `prepare` reads, in a process of its own."""

    def prepare(self, setting: Setting) -> PreparedStep:
        """Load the model for calls of exactly `setting.batch` rows."""


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A variant that reads what is stored already, and may run `compiled` by torch."""

    compiled: bool = False
    needs: tuple[str, ...] = ()
    caches: bool = False
    builds: ClassVar[bool] = False

    def build(self, setting: Setting) -> None:
        """Write nothing."""


VARIANTS: dict[str, Variant] = {}
KINDS: dict[str, Kind] = {}


def register_variant(name: str, kind: Kind) -> Callable[[type[Variant]], type[Variant]]:
    """Return a decorator that registers a variant under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def fill(variant: type[Variant]) -> type[Variant]:
        add(name, kind, variant())
        return variant

    return fill


def add(name: str, kind: Kind, variant: Variant) -> None:
    """Register a variant under `name`.

    Raises:
        ValueError: the name is taken.
    """
    if name in VARIANTS:
        raise ValueError(f"a variant called {name} is registered already")
    VARIANTS[name], KINDS[name] = variant, kind


def names_of(kind: Kind) -> tuple[str, ...]:
    """Return the names of the registered backends or peers, in the order of their registration."""
    return tuple(name for name in VARIANTS if KINDS[name] == kind)


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def absent(name: str) -> str:
    """Return what to install for a variant, or nothing."""
    missing = [
        DISTRIBUTIONS.get(module, module) for module in VARIANTS[name].needs if not _importable(module)
    ]
    return f"{name} needs {' and '.join(missing)}; install with: pip install 'tfmq[bench]'" if missing else ""


def import_needs(name: str) -> None:
    """Import what a variant needs, so that memory and time from here on are those of the model."""
    for module in VARIANTS[name].needs:
        importlib.import_module(module)
