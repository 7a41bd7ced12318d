"""Keep the outputs of finished units instead of running these units again: calls of the next unit begin where
the last one ended.
"""

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import nan
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from tfmq.calibration.capture import Around, Keep, alone
from tfmq.calibration.forward import replaced_forward
from tfmq.nn.watch import all_watched
from tfmq.numerics.trees import map_tensors
from tfmq.storage.atomic import full_disk_named, read_tensors

Network = Literal["full", "quantized"]
# Bytes of outputs kept on disk. Units whose outputs do not fit are computed again for each unit after them.
MOST_BYTES = 16 * 2**30
# Share of the free space on the disk that kept outputs may use.
SHARE = 0.5


class _Outputs:
    """Outputs of units in one network, a file for each unit and batch."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        self.directory = directory
        self.bytes_left = most_bytes
        self._kept: dict[str, dict[int, _Output]] = {}
        self._run: set[str] = set()
        self._unread: set[str] = set()

    @contextmanager
    def around(self, units: Mapping[str, nn.Module], batch: int) -> Iterator[None]:
        """Let `units` return what they returned for this batch before, as far as it was kept; keep what the
        others return.
        """
        seen: dict[str, list[Any]] = {}
        kept = [name for name in units if batch in self._kept.get(name, {})]
        running = {name: unit for name, unit in units.items() if name not in {*kept, *self._run}}
        with ExitStack() as stack:
            for name in kept:
                stack.enter_context(_returning(units[name], partial(self._read, name, batch)))
            stack.enter_context(
                all_watched(
                    running, after=lambda call: seen.setdefault(call.name, []).append(_copied(call.output))
                )
            )
            yield
        for name, outputs in seen.items():
            self._keep(name, batch, outputs)

    def _keep(self, name: str, batch: int, outputs: list[Any]) -> None:
        values, spec = tree_flatten(outputs[0])
        leaves = [_Leaf.of(value) for value in values]
        tensors = {
            str(i): leaf.stored(value)
            for i, (leaf, value) in enumerate(zip(leaves, values, strict=True))
            if leaf.device
        }
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        # A unit has to run itself if it runs twice in a call, or hides tensors in what it returns.
        if len(outputs) > 1 or not tensors or size > self.bytes_left:
            self._run.add(name)
            return
        self.bytes_left -= size
        path = self.directory / f"{name}.{batch:06d}.safetensors"
        with full_disk_named(path, needed_bytes=size):
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file(tensors, path)
        self._kept.setdefault(name, {})[batch] = _Output(path, size, leaves, spec)

    def keep(self, name: str, batch: int, output: Any) -> None:
        """Keep what a unit that runs once in a call has returned for a batch."""
        if name not in self._run:
            self._keep(name, batch, [output])

    def discard(self, name: str) -> None:
        """Forget what `name` returned, which it would not return any more."""
        for output in self._kept.pop(name, {}).values():
            output.path.unlink()
            self.bytes_left += output.size

    def _read(self, name: str, batch: int) -> Any:
        output = self._kept[name][batch]
        return output.unread() if name in self._unread else output.read()

    def forget(self, readers: Mapping[str, set[str]]) -> None:
        """Delete what nobody will read: each of its `readers` returns what it returned before, and so does
        not look at its inputs.
        """
        settled = {name for name in self._kept if name not in self._run}
        for name in settled - self._unread:
            if name in readers and readers[name] <= settled:
                self._unread.add(name)
                for output in self._kept[name].values():
                    output.path.unlink()
                    self.bytes_left += output.size

    def revive(self) -> bool:
        """Take nothing for kept any more, if something was deleted: what ran since may have read it. Return
        whether that was so.
        """
        revived = bool(self._unread)
        if revived:
            for name in self._kept.keys() - self._unread:
                for output in self._kept[name].values():
                    output.path.unlink()
                    self.bytes_left += output.size
            self._kept.clear()
            self._unread.clear()
        return revived


def _copied(tree: Any) -> Any:
    """Return an output as it is now: a denoiser may write into it afterwards."""
    return map_tensors(lambda leaf: leaf.detach().clone(), tree)


@dataclass(frozen=True)
class _Output:
    """What a unit returned for a batch: a file of `size` bytes, and how its leaves go together."""

    path: Path
    size: int
    leaves: "list[_Leaf]"
    spec: TreeSpec

    def read(self) -> Any:
        """Return the output, read from its file."""
        tensors, _ = read_tensors(self.path)
        return tree_unflatten(
            [
                leaf.restored(tensors[str(i)]) if leaf.device else leaf.value
                for i, leaf in enumerate(self.leaves)
            ],
            self.spec,
        )

    def unread(self) -> Any:
        """Return something of the same form that shows wherever it gets to."""
        return tree_unflatten(
            [leaf.unread() if leaf.device else leaf.value for leaf in self.leaves], self.spec
        )


@dataclass(frozen=True)
class _Leaf:
    """A leaf of an output: a plain `value`, or a tensor like `form` on `device` with its axes in the `order`
    of memory.

    The order is part of a result: kernels sum otherwise over another, and a resumed job must end in the same
    bytes.
    """

    value: Any = None
    device: torch.device | None = None
    order: tuple[int, ...] = ()
    form: Tensor | None = None

    @classmethod
    def of(cls, value: Any) -> "_Leaf":
        """Describe a leaf: a tensor by its form, any other value by itself."""
        if not isinstance(value, Tensor):
            return cls(value=value)
        return cls(
            device=value.device,
            order=tuple(sorted(range(value.ndim), key=value.stride, reverse=True)),
            form=value.to("meta"),
        )

    def unread(self) -> Tensor:
        """Return a tensor of that form: NaN where there is such a number."""
        assert self.form is not None
        return torch.full(
            self.form.shape,
            nan if self.form.is_floating_point() else 0,
            dtype=self.form.dtype,
            device=self.device,
        )

    def stored(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it goes to disk."""
        return tensor.detach().permute(self.order).contiguous().cpu()

    def restored(self, tensor: Tensor) -> Tensor:
        """Return the tensor as it was; in memory of its own, since that of a file is aligned otherwise."""
        return tensor.to(self.device, copy=True).permute(
            [self.order.index(axis) for axis in range(tensor.ndim)]
        )


def _returning(unit: nn.Module, value: Callable[[], Any]) -> AbstractContextManager[None]:
    """Let `unit` return a value that is there already."""
    return replaced_forward(unit, lambda *_, **__: value())


class Upstream:
    """The units that are done, whose outputs the calls of later units start from.

    Outputs are kept for the full-precision network and for the quantized one, in `directory`, which is
    emptied first; at most `most_bytes` of them, and no more than half of the space that is left. Without a
    directory every unit runs again. `readers` names the units that read the output of a unit, where that is
    known: once all of them are kept, it is deleted. `once` are the units that are known to run once in a
    call.
    """

    def __init__(
        self,
        directory: Path | None,
        *,
        most_bytes: int = MOST_BYTES,
        readers: Mapping[str, set[str]] | None = None,
        once: Collection[str] = (),
    ) -> None:
        self._readers = readers or {}
        self._once = once
        self._units: dict[str, nn.Module] = {}
        self._networks: dict[Network, _Outputs] = {}
        if directory is None:
            return
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        most = min(most_bytes, int(SHARE * shutil.disk_usage(directory).free))
        self._networks = {
            network: _Outputs(directory / network, most // 2) for network in ("full", "quantized")
        }

    def add(self, name: str, unit: nn.Module) -> None:
        """Take a unit for done: its outputs do not change any more."""
        for network in self._networks.values():
            network.forget(self._readers)
        self._units[name] = unit

    def revive(self) -> bool:
        """Let the units run again, because somebody reads outputs that were deleted; return whether any
        were.
        """
        self._readers = {}
        return any([network.revive() for network in self._networks.values()])

    def keeper(self, network: Network, name: str) -> Keep | None:
        """Return what takes the outputs of a unit whose turn it is, so that it does not have to run again for
        them; None where it has to.
        """
        return (
            partial(self._networks[network].keep, name)
            if network in self._networks and name in self._once
            else None
        )

    def discard(self, network: Network, name: str) -> None:
        """Forget the outputs of a unit, which has changed."""
        if network in self._networks:
            self._networks[network].discard(name)

    def around(self, network: Network) -> Around:
        """Return the context in which the call of a batch, by its number, starts from what is kept."""
        if network not in self._networks:
            return alone
        return partial(self._networks[network].around, self._units)
