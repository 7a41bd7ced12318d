"""A denoiser that is prepared for several ways to compute: one is in place, the others wait beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from tfmq.backends.backend import BACKENDS, Coverage, Options, release
from tfmq.nn.swap import Executor, parts_of, plain_forward
from tfmq.numerics.trees import tensors_in
from tfmq.quantizers.part import Execution, Part

# Calls of one kind take the same time: the shapes, dtypes and devices of their tensors, and their other
# arguments by type.
Kind = tuple[Any, ...]


def kind_of(arguments: Mapping[str, Any]) -> Kind:
    """Return the kind of a call. Values of numbers do not count: a timestep may be one."""
    leaves = tree_flatten(dict(arguments))[0]
    return tuple(
        (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves
    )


class Way(NamedTuple):
    """A backend with its options."""

    backend: str
    options: Options

    @property
    def layerwise(self) -> bool:
        """Whether it computes the layers of a denoiser one by one, so that adapters beside them count."""
        return not self.options.compile and self.backend != "openvino"

    def __str__(self) -> str:
        return f"{self.backend} compiled" if self.options.compile else self.backend


@dataclass(frozen=True)
class _Parts:
    """What a backend has put into a denoiser: its executor, and the execution of each part."""

    executor: Executor | None
    executions: tuple[tuple[Part, Execution | None], ...]


def _parts(module: nn.Module, executor: Executor | None) -> _Parts:
    return _Parts(executor, tuple((child, child.execution) for child in parts_of(module)))


class Prepared:
    """Holds what was prepared, and changes what is in place. The denoiser's own executor stays whoever holds
    this.
    """

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
                for child, execution in parts.executions:
                    child.execute(execution)
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
        return (
            plain_forward(module, arguments) if self._executor is None else self._executor(module, arguments)
        )


def differentiates(module: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a gradient of the call could be asked for."""
    if not torch.is_grad_enabled():
        return False
    return any(tensor.requires_grad for tensor in (*tensors_in(dict(arguments)), *module.parameters()))
