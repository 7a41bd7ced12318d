"""The contract of a backend, and the registry of all."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from torch import nn

from tfmq.nn.packed_layer import KeptWeight, PackedLayer
from tfmq.nn.plan import packed_layers
from tfmq.nn.swap import release_parts

WeightForm = Literal["unpacked", "packed"]


class EngineError(RuntimeError):
    """An engine could not compile or run a model; the message names the engine and, where known, the
    layer.
    """


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a backend trades memory for time.

    `weights`: "unpacked" keeps each weight in the form that executes fastest, one byte each beside the packed
    codes; "packed" unpacks at each call.
    `compile`: let the backend's graph compiler run; the first call takes longer. `threads`: of an engine with
    threads of its own. `device`: of the backend `openvino`, by OpenVINO's name, such as "GPU", "NPU" or
    "AUTO"; no other than "CPU" has been tested.
    """

    weights: WeightForm = "unpacked"
    compile: bool = False
    threads: int | None = None
    device: str = "CPU"

    def __post_init__(self) -> None:
        if self.weights not in ("unpacked", "packed"):
            raise ValueError(f'weights are kept "unpacked" or "packed", got {self.weights!r}')


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which layers compute in integers, and which stay in floating point, with the reason."""

    integer: tuple[str, ...]
    floating: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """Makes a packed denoiser compute by its means, in place; its state dict does not change.

    `missing` names what the machine lacks for it, or is empty. `attach` returns what it covers; `release`
    below undoes it.

    """

    def missing(self) -> str:
        """Return what the machine lacks for the backend, in words; nothing where it can run."""

    def attach(self, module: nn.Module, options: Options) -> Coverage:
        """Make the packed denoiser `module` compute by the backend, in place; return what that covers."""


BACKENDS: dict[str, Backend] = {}


def register_backend(name: str) -> Callable[[type[Backend]], type[Backend]]:
    """Return a decorator that registers a backend under `name`.

    Raises:
        ValueError: the name is taken.
    """

    def fill(kind: type[Backend]) -> type[Backend]:
        if name in BACKENDS:
            raise ValueError(f"a backend called {name} is registered already")
        BACKENDS[name] = kind()
        return kind

    return fill


release = release_parts


def by_input(module: nn.Module) -> tuple[dict[str, PackedLayer], dict[str, str]]:
    """Return the layers that can compute in integers, those with a quantized input, and for each other layer
    why it cannot.
    """
    layers = packed_layers(module)
    floating = {
        name: "its input is not quantized" for name, layer in layers.items() if layer.input_quantizer is None
    }
    return {name: layer for name, layer in layers.items() if name not in floating}, floating


def keep_unpacked(module: nn.Module, options: Options) -> None:
    """Keep the float weight of every layer that computes in floating point, unless memory counts more than
    time.
    """
    for layer in packed_layers(module).values():
        if layer.execution is None and options.weights == "unpacked":
            layer.execute(KeptWeight(layer.weight))
