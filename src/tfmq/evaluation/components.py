"""The components of a pipeline that have weights, with what of each is quantized."""

from dataclasses import dataclass

from torch import nn

from tfmq.models.sampler import Sampler
from tfmq.nn.plan import packed_layers
from tfmq.nn.size import state_bytes
from tfmq.nn.swap import networks_of


@dataclass(frozen=True)
class Component:
    """A component: its name in the pipeline, its class, the bytes of its tensors, the networks in it that are
    quantized (`""` is all of it), and how many of their layers.
    """

    name: str
    kind: str
    bytes: int
    networks: tuple[str, ...]
    layers: int


def find_components(sampler: Sampler) -> tuple[Component, ...]:
    """Return the components of a sampler's pipeline, the largest first; none where it has no pipeline."""
    pipeline = getattr(sampler, "pipeline", None)
    parts = {} if pipeline is None else pipeline.components
    found = (_component(name, part) for name, part in parts.items() if isinstance(part, nn.Module))
    return tuple(sorted(found, key=lambda part: (-part.bytes, part.name)))


def _component(name: str, part: nn.Module) -> Component:
    return Component(
        name, type(part).__name__, state_bytes(part), tuple(networks_of(part)), len(packed_layers(part))
    )
