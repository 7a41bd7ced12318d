"""Outputs of units that are done, in the place of running them again: the calls of the next unit begin where the last one ended."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tfmq.calibration.capture import Around, alone
from tfmq.storage.atomic import full_disk_named, read_tensors

Network = Literal["full", "quantized"]
# Of outputs on disk; units beyond run again for each unit after them.
MOST_BYTES = 16 * 2**30
# Of what the disk has left.
SHARE = 0.5


class _Outputs:
    """Outputs of units in one network, a file for each unit and batch."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory = directory
        self.bytes_left = most_bytes
        self._kept: dict[tuple[str, int], tuple[Path, list[_Leaf], TreeSpec]] = {}
        self._run: set[str] = set()

    @contextmanager
    def around(self, units: Mapping[str, nn.Module], batch: int) -> Iterator[None]:
        """Let `units` return what they returned for this batch before, as far as it was kept; keep what the others return."""
        seen: dict[str, list[Any]] = {}
        with ExitStack() as stack:
            for name, unit in units.items():
                if (name, batch) in self._kept:
                    stack.enter_context(_returning(unit, partial(self._read, name, batch)))
                elif name not in self._run:
                    handle = unit.register_forward_hook(lambda _, __, output, name=name: seen.setdefault(name, []).append(output))
                    stack.callback(handle.remove)
            yield
        for name, outputs in seen.items():
            self._keep(name, batch, outputs)

    def _keep(self, name: str, batch: int, outputs: list[Any]) -> None:
        values, spec = tree_flatten(outputs[0])
        leaves = [_Leaf.of(value) for value in values]
        tensors = {str(i): leaf.stored(value) for i, (leaf, value) in enumerate(zip(leaves, values, strict=True)) if leaf.device}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # A unit that runs twice in a call, or returns something with tensors out of sight, has to run.
        if len(outputs) > 1 or not tensors or size > self.bytes_left:
            self._run.add(name)
            return
        self.bytes_left -= size
        path = self.directory / f"{len(self._kept):06d}.safetensors"
        with full_disk_named(path, needed_bytes=size):
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
        self._kept[name, batch] = path, leaves, spec

    def _read(self, name: str, batch: int) -> Any:
        path, leaves, spec = self._kept[name, batch]
        tensors, _ = read_tensors(path)
        return tree_unflatten([leaf.restored(tensors[str(i)]) if leaf.device else leaf.value for i, leaf in enumerate(leaves)], spec)


@dataclass(frozen=True)
class _Leaf:
    """A leaf of an output: a plain `value`, or a tensor on `device` with its axes in the `order` of memory.

    The order is part of a result: kernels sum otherwise over another, and a resumed job must end in the same bytes.
    """

    value: Any = None
    device: torch.device | None = None
    order: tuple[int, ...] = ()

    @classmethod
    def of(cls, value: Any) -> "_Leaf":
        if not isinstance(value, Tensor):
            return cls(value=value)
        return cls(device=value.device, order=tuple(sorted(range(value.ndim), key=value.stride, reverse=True)))

    def stored(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it goes to disk."""
        return tensor.detach().permute(self.order).contiguous().cpu()

    def restored(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it was; in memory of its own, since that of a file is aligned otherwise."""
        return tensor.to(self.device, copy=True).permute([self.order.index(axis) for axis in range(tensor.ndim)])


@contextmanager
def _returning(unit: nn.Module, value: Callable[[], Any]) -> Iterator[None]:
    """Replace the forward of `unit` for a while."""
    own = unit.__dict__.get("forward")
    unit.forward = lambda *_, **__: value()
    try:
        yield
    finally:
        del unit.forward
        if own is not None:
            unit.forward = own


class Upstream:
    """The units that are done, whose outputs the calls of later units start from.

    Outputs are kept for the full-precision network and for the quantized one, in `directory`, which is emptied first; at most `most_bytes` of
    them, and no more than half of the space that is left. Without a directory every unit runs again.
    """

    def __init__(self, directory: Path | None, *, most_bytes: int = MOST_BYTES) -> None:
        self._units: dict[str, nn.Module] = {}
        self._networks: dict[Network, _Outputs] = {}
        if directory is None:
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        most = min(most_bytes, int(SHARE * shutil.disk_usage(directory).free))
        self._networks = {network: _Outputs(directory / network, most // 2) for network in ("full", "quantized")}

    def add(self, name: str, unit: nn.Module) -> None:
        """Take a unit for done: its outputs do not change any more."""
        self._units[name] = unit

    def around(self, network: Network) -> Around:
        """Return the context in which the call of a batch, by its number, starts from what is kept."""
        if network not in self._networks:
            return alone
        return partial(self._networks[network].around, self._units)
