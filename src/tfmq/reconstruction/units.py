"""Find the modules that are reconstructed together, by structure."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Unit:
    """A submodule whose output is reconstructed, and the layers below it whose roundings are learned for
    that.
    """

    name: str
    layers: tuple[str, ...]


class _Blocks:
    """Walks down a module to the outermost blocks that hold some of the layers `order`."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = order

    def layers(self, path: str) -> tuple[str, ...]:
        """Return the layers at or below `path`."""
        return tuple(layer for layer in self.order if layer == path or layer.startswith(f"{path}."))

    def is_composite(self, path: str) -> bool:
        """Whether a layer lies below `path`, and not at it."""
        return any(layer != path for layer in self.layers(path))

    def holds_blocks(self, module: nn.Module, path: str) -> bool:
        """Whether `module` is, or directly owns, a list of composite modules: it is a stage, and its parts
        are the blocks.
        """
        lists = [path] if isinstance(module, nn.ModuleList) else []
        lists += [
            f"{path}.{name}"
            for name, child in module.named_children()
            if isinstance(child, nn.ModuleList | nn.Sequential)
        ]
        return any(
            self.is_composite(f"{parts}.{layer[len(parts) + 1 :].partition('.')[0]}")
            for parts in lists
            for layer in self.layers(parts)
        )

    def find(self, module: nn.Module, prefix: str = "") -> list[str]:
        """Return the paths of the blocks below `module`."""
        names = []
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if not self.layers(path):
                continue
            if path in self.order or not (isinstance(child, nn.ModuleList) or self.holds_blocks(child, path)):
                names.append(path)
            else:
                names += self.find(child, f"{path}.")
        return names


def find_units(module: nn.Module, order: Sequence[str], *, exclude: Sequence[str] = ()) -> tuple[Unit, ...]:
    """Return the units of a denoiser in execution order.

    A unit is an outermost submodule that holds some of the layers and does not itself hold a list of
    composite modules: residual blocks, attention blocks, transformer blocks, and single layers elsewhere
    (BRECQ's choice, Li et al., 2021, found without class names).

    Args:
        module: the denoiser.
        order: names of the layers to reconstruct, in execution order.
        exclude: layers that belong to no unit, such as the temporal ones.
    """
    blocks = _Blocks(order)
    units = []
    for name in blocks.find(module):
        layers = tuple(layer for layer in blocks.layers(name) if layer not in exclude)
        if layers:
            units.append(Unit(name, layers))
    return tuple(sorted(units, key=lambda unit: order.index(unit.layers[0])))
