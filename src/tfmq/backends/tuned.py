"""Tiles that were measured on a device, kept in a file of its own in the user's cache."""

import re
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path

import torch

from tfmq.backends.caching import cache_directory
from tfmq.errors import require
from tfmq.storage.atomic import read_json, write_json
from tfmq.storage.errors import CheckpointError
from tfmq.version import __version__


class StoredTiles(MutableMapping[str, Sequence[int]]):
    """Choices by key, read from `path` when made and written to it as they come.

    Nothing in the file is needed: one that is missing, damaged, or cannot be written costs the time to
    measure again. What another process wrote in the meantime is read again before the file is replaced.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tiles = self._read()

    @classmethod
    def of_device(cls) -> "StoredTiles":
        """Return those of the current CUDA device with these versions of torch, Triton and tfmq."""
        versions = torch.__version__, require("triton", extra="cuda").__version__, __version__
        name = "-".join((torch.cuda.get_device_name(), *versions))
        return cls(cache_directory("cuda") / f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', name)}.json")

    def _read(self) -> dict[str, Sequence[int]]:
        """Return what the file holds that is a choice; nothing if it is not there or not whole."""
        try:
            found = read_json(self.path).items()
        except (CheckpointError, OSError):
            return {}
        return {
            key: tile
            for key, tile in found
            if isinstance(tile, list) and all(type(size) is int for size in tile)
        }

    def __getitem__(self, key: str) -> Sequence[int]:
        return self.tiles[key]

    def __setitem__(self, key: str, tile: Sequence[int]) -> None:
        self.tiles = self._read() | self.tiles | {key: list(tile)}
        self._write()

    def __delitem__(self, key: str) -> None:
        del self.tiles[key]
        self._write()

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.tiles)
        except (CheckpointError, OSError):
            # The disk is full or read-only: this process keeps its choices in memory.
            return

    def __iter__(self) -> Iterator[str]:
        return iter(self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)
