"""A denoiser that is prepared for several ways to compute: one is in place, the others wait beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tfmq.backends.backend import BACKENDS, Coverage, Options, release
from tfmq.nn.embedding import PackedEmbedding
from tfmq.nn.layer import PackedLayer
from tfmq.nn.packed import PackedWeight
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.swap import Executor, plain_forward

# Names of the attributes that a backend sets, by the kind of module; see `release`.
ATTRIBUTES: dict[type[nn.Module], tuple[str, ...]] = {
    PackedLayer: ("kernel", "unpacked", "decoded", "input_precision"),
    PackedEmbedding: ("decoded",),
    ProductQuantizers: ("kernel", "attention_kernel", "idle"),
}

# Calls of one kind take the same time: the shapes, dtypes and devices of their tensors, and their other arguments by type.
Kind = tuple[Any, ...]


def kind_of(arguments: Mapping[str, Any]) -> Kind:
    """Return the kind of a call. Values of numbers do not count: a timestep may be one."""
    leaves = tree_flatten(dict(arguments))[0]
    return tuple((leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


class Way(NamedTuple):
    """A backend with its options."""

    backend: str
    options: Options

    def __str__(self) -> str:
        return f"{self.backend} compiled" if self.options.compile else self.backend


@dataclass(frozen=True)
class _Parts:
    """What a backend has put into a denoiser: its executor, and the attributes of each module, and whether packed codes were shelved."""

    executor: Executor | None
    attributes: tuple[tuple[nn.Module, Mapping[str, Any], bool], ...]


def _parts(module: nn.Module, executor: Executor | None) -> _Parts:
    found: list[tuple[nn.Module, Mapping[str, Any], bool]] = []
    for child in module.modules():
        names = next((names for kind, names in ATTRIBUTES.items() if isinstance(child, kind)), None)
        if names is not None:
            found.append((child, {name: getattr(child, name) for name in names}, isinstance(child, PackedLayer) and child.shelved))
    return _Parts(executor, tuple(found))


def _put(parts: _Parts) -> None:
    for child, attributes, shelved in parts.attributes:
        for name, value in attributes.items():
            # The model may have moved in the meantime.
            here = isinstance(child, PackedWeight) and isinstance(value, nn.Module | Tensor)
            setattr(child, name, value.to(child.scale.device) if here else value)
        if shelved and isinstance(child, PackedLayer):
            child.shelve()


class Prepared:
    """Holds what was prepared, and changes what is in place. The denoiser's own executor stays whoever holds this."""

    def __init__(self) -> None:
        self.current: Way | None = None
        self._executor: Executor | None = None
        self._aside: dict[Way, _Parts] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Prepared":
        # The copied denoiser holds a copy of the backend in place; backends that wait belong to this one.
        copied = Prepared()
        copied.current, copied._executor = self.current, self._executor
        return copied

    def use(self, module: nn.Module, way: Way) -> Coverage | None:
        """Put a way in place; what it covers where it is prepared for the first time.

        Raises:
            RuntimeError, ValueError: it cannot be prepared; nothing is in place then.
        """
        if way == self.current:
            return None
        if self.current is not None:
            self._aside[self.current] = _parts(module, self._executor)
        own, coverage = module.tfmq_executor, None
        self.current = self._executor = None
        release(module)
        try:
            if way in self._aside:
                parts = self._aside.pop(way)
                _put(parts)
                self._executor = parts.executor
            else:
                coverage = BACKENDS[way.backend].attach(module, way.options)
                self._executor = module.tfmq_executor  # type: ignore[assignment]
            self.current = way
        finally:
            if self.current is None:
                release(module)
            module.tfmq_executor = own
        return coverage

    @property
    def graphs(self) -> bool:
        """Whether what is in place computes the denoiser as a whole."""
        return self._executor is not None

    def drop(self, module: nn.Module, way: Way) -> None:
        """Forget a way; the simulation is in place where it was."""
        self._aside.pop(way, None)
        if way == self.current:
            own = module.tfmq_executor
            self.current = self._executor = None
            release(module)
            module.tfmq_executor = own

    def keep(self, module: nn.Module, ways: Sequence[Way]) -> None:
        """Forget all other ways."""
        for way in {*self._aside, self.current} - {*ways, None}:
            assert way is not None
            self.drop(module, way)

    def run(self, module: nn.Module, way: Way, arguments: Mapping[str, Any]) -> Any:
        """Compute a call by a way."""
        self.use(module, way)
        return plain_forward(module, arguments) if self._executor is None else self._executor(module, arguments)


def differentiates(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a gradient of the call could be asked for."""
    if not torch.is_grad_enabled():
        return False
    leaves = (*tree_flatten(dict(arguments))[0], *module.parameters())
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
