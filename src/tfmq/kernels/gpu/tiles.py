"""How a matrix product is cut up for a device: the tiles to choose from, and the choice by measuring, which
is kept.
"""

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import astuple, dataclass

import torch
import triton
from triton.runtime.errors import OutOfResources


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of one program's blocks, warps that compute it, and blocks in flight.

    `group` rows of programs walk the columns together, so that they find each other's blocks in the cache.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    group: int = 8


# The first tile needs the least memory. It runs where a CUDA graph is recorded before anything was measured.
TILES = (
    Tile(64, 64, 64, 4, 3),
    Tile(16, 32, 128, 4, 4),
    Tile(16, 64, 256, 4, 3),
    Tile(32, 64, 128, 4, 3),
    Tile(64, 128, 64, 4, 4),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 3),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 128, 64, 4, 3),
    Tile(128, 128, 128, 8, 3),
    Tile(128, 256, 64, 8, 3),
    Tile(256, 128, 64, 8, 3),
)

# The chosen tile of each problem. A backend replaces this mapping by one that outlives the process.
choices: MutableMapping[str, Sequence[int]] = {}


def keep_in(mapping: MutableMapping[str, Sequence[int]]) -> None:
    """Keep choices in `mapping` from now on."""
    global choices
    choices = mapping


def _fitting(tiles: Sequence[Tile], rows: int, columns: int) -> list[Tile]:
    """Return the tiles that are neither much larger nor much smaller than the product; the first of all where
    none is left.

    What is left out would cost seconds of compilation.
    """
    high, wide = max(16, triton.next_power_of_2(rows)), max(32, triton.next_power_of_2(columns))
    return [tile for tile in tiles if min(high, 512) // 8 <= tile.m <= high and tile.n <= wide] or [tiles[0]]


def _seconds(launch: Callable[[Tile], None], tile: Tile) -> float:
    try:
        # Not by `tfmq.stopwatch`: events on the device time a launch that the host does not wait for, and the
        # cache is emptied between two of them.
        return float(triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=20, return_mode="median"))
    except OutOfResources:
        return float("inf")


def chosen(kernel: str, rows: int, rest: tuple[int, ...], launch: Callable[[Tile], None]) -> Tile:
    """Return the fastest tile for a product of `rows` rows; `rest` (columns, depth and whatever else counts)
    is met exactly.

    Rows count to the next power of two. A shape that comes for the first time is measured, which takes tenths
    of a second; never while a CUDA graph is recorded, which measuring would break.

    Raises:
        RuntimeError: no tile fits into the device's shared memory.
    """
    key = f"{kernel} {triton.next_power_of_2(rows)} {' '.join(map(str, rest))}"
    known = _known(key)
    if known is not None:
        return known
    if torch.cuda.is_current_stream_capturing():
        return TILES[0]
    candidates = _fitting(TILES, rows, rest[0])
    times = [_seconds(launch, tile) for tile in candidates]
    if min(times) == float("inf"):
        raise RuntimeError(
            f"no tile of {kernel} fits into the shared memory of {torch.cuda.get_device_name()}"
        )
    best = candidates[times.index(min(times))]
    choices[key] = astuple(best)
    return best


def _known(key: str) -> Tile | None:
    """Return a tile that was chosen before, unless it is none of those that there are."""
    kept = choices.get(key)
    tile = None if kept is None or len(kept) != len(astuple(TILES[0])) else Tile(*kept)
    return tile if tile in TILES else None
