"""Denoiser calls on disk, one safetensors file a call."""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq.models.denoiser import Inputs
from tfmq.storage.atomic import read_tensors, write_tensors


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON; tensors go to `tensors` under their path and a number."""
    match value:
        case Tensor():
            numbered = f"{name}:{len(tensors)}"
            tensors[numbered] = value
            return {"tensor": numbered}
        case dict():
            _check_keys(value, name)
            return {"dict": {key: _encode(item, f"{name}.{key}", tensors) for key, item in value.items()}}
        case list() | tuple():
            items = [_encode(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
            return {type(value).__name__: items}
        case None | bool() | int() | float() | str():
            return {"value": value}
    raise TypeError(
        f"a denoiser argument of type {type(value).__name__} cannot be "
        f"stored ({name}); tensors and plain values can"
    )


def _check_keys(value: dict[Any, Any], name: str) -> None:
    """Refuse a mapping that JSON would not keep."""
    for key in value:
        if not isinstance(key, str):
            raise TypeError(
                f"a denoiser argument with a key of type {type(key).__name__} "
                f"cannot be stored ({name}); names can"
            )


def _decode(value: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content.items()}
    if kind in ("list", "tuple"):
        items = [_decode(item, tensors) for item in content]
        return items if kind == "list" else tuple(items)
    return content


def _read(path: Path) -> Inputs:
    """Read one call."""
    tensors, metadata = read_tensors(path)
    return Inputs(
        tensors["sample"], tensors["timestep"], _decode(json.loads(metadata["conditions"]), tensors)
    )


class CalibrationStore:
    """A directory of recorded denoiser calls in the order in which the sampler made them; reading streams one
    call at a time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)
        self._timesteps: list[Tensor] = []

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("call_*.safetensors"))

    def __len__(self) -> int:
        return len(self._paths())

    def clear(self) -> None:
        """Delete every call, those in parts too."""
        self._timesteps.clear()
        for path in self._paths():
            path.unlink()
        for folder in (*self.directory.glob("part_*"), *self.directory.glob("of_*")):
            shutil.rmtree(folder)

    def of(self, name: str) -> "CalibrationStore":
        """Return the store, within this one, of the calls that another network had on the same
        trajectory.
        """
        return CalibrationStore(self.directory / f"of_{name}")

    def part(self, number: int) -> "CalibrationStore":
        """Return an empty store that lies within this one, for calls that this one takes over later; see
        `adopt`.
        """
        part = CalibrationStore(self.directory / f"part_{number:05d}")
        part.clear()
        return part

    def adopt(self, numbers: Sequence[int]) -> None:
        """Move the calls of the parts `numbers` behind those that are here, in that order."""
        for number in numbers:
            self._take(CalibrationStore(self.directory / f"part_{number:05d}"))

    def _take(self, other: "CalibrationStore") -> None:
        """Move the calls of another store behind those that are here, those of its networks too."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in other._paths():
            path.replace(self.directory / f"call_{len(self):05d}.safetensors")
        for folder in sorted(other.directory.glob("of_*")):
            CalibrationStore(self.directory / folder.name)._take(CalibrationStore(folder))
        other.directory.rmdir()

    def append(self, inputs: Inputs) -> None:
        """Write one call."""
        self.directory.mkdir(parents=True, exist_ok=True)
        tensors = {"sample": inputs.sample.cpu(), "timestep": inputs.timestep.cpu()}
        conditions = _encode(dict(inputs.conditions), "conditions", tensors)
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        write_tensors(
            self.directory / f"call_{len(self):05d}.safetensors",
            tensors,
            metadata={"conditions": json.dumps(conditions)},
        )

    def read(self, index: int) -> Inputs:
        """Read one call."""
        return _read(self._paths()[index])

    def __iter__(self) -> Iterator[Inputs]:
        yield from map(_read, self._paths())

    def timesteps(self) -> Tensor:
        """Return the distinct timesteps, ascending, float32 `[S]`."""
        for path in self._paths()[len(self._timesteps) :]:
            self._timesteps.append(read_tensors(path)[0]["timestep"].float())
        return torch.cat(self._timesteps).unique()

    def every_index(self, interval: int) -> list[int]:
        """Return the numbers of the calls of every `interval`-th distinct timestep from noise to image, and
        of the last (all guidance halves), in order.
        """
        timesteps = self.timesteps().flip(0).tolist()
        kept = {*timesteps[::interval], timesteps[-1]}
        return [index for index in range(len(self._timesteps)) if self.timestep_of(index) in kept]

    def calls(self, numbers: Iterable[int]) -> Iterator[Inputs]:
        """Yield the calls of these numbers; the others are not read."""
        paths = self._paths()
        yield from (_read(paths[number]) for number in numbers)

    def timestep_of(self, index: int) -> float:
        """Return the timestep of one call."""
        return float(self._steps_of(index)[0])

    def rows_of(self, index: int) -> int:
        """Return the number of samples of one call."""
        return len(self._steps_of(index))

    def _steps_of(self, index: int) -> Tensor:
        if index >= len(self._timesteps):
            self.timesteps()
        return self._timesteps[index]


@dataclass(frozen=True)
class StoredBatches:
    """The calls of every `interval`-th timestep of a store, read from disk again whenever they are iterated
    over.

    The samples take `turns`: each is there at every `turns`-th of these timesteps, and at each timestep are
    as many.
    """

    store: CalibrationStore
    interval: int
    turns: int = 1

    def __iter__(self) -> Iterator[Inputs]:
        chosen = {index: places for index, places in self._chosen() if len(places)}
        for inputs, places in zip(self.store.calls(chosen), chosen.values(), strict=True):
            yield inputs if len(places) == len(inputs) else inputs.picked(places)

    def _chosen(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the number of each call, and the places of the samples whose turn it is."""
        store, ranks, seen = self.store, dict[float, int](), dict[float, int]()
        for index in store.every_index(self.interval):
            timestep, rows = store.timestep_of(index), store.rows_of(index)
            rank = ranks.setdefault(timestep, len(ranks))
            first = seen.get(timestep, 0)
            seen[timestep] = first + rows
            places = range(-(first + rank) % self.turns, rows, self.turns)
            yield index, torch.tensor(places, dtype=torch.int64)
