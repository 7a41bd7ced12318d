"""The choice of a tile: measured once, kept, and never taken from what is no tile."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

tiles = pytest.importorskip("tfmq.kernels.gpu.tiles")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the tiles that were measured; tiles of 128 columns are the fastest, those of 256 do not fit."""
    seen: list[Any] = []

    def seconds(launch: Any, tile: Any) -> float:
        seen.append(tile)
        return float("inf") if tile.n == 256 else abs(tile.n - 128) + tile.m / 1024

    monkeypatch.setattr(tiles, "_seconds", seconds)
    monkeypatch.setattr(tiles, "choices", {})
    monkeypatch.setattr(tiles.torch.cuda, "is_current_stream_capturing", lambda: False)
    yield seen


def launch(tile: Any) -> None:
    """Stand for a kernel."""


def test_the_fastest_is_measured_once(measured: list[Any]) -> None:
    first = tiles.chosen("kernel", 1000, (512, 64), launch)
    assert first.n == 128 and first in tiles.TILES and measured
    count = len(measured)
    assert tiles.chosen("kernel", 900, (512, 64), launch) == first and len(measured) == count
    tiles.chosen("kernel", 1000, (512, 65), launch)
    assert len(measured) > count


def test_few_rows_measure_small_tiles(measured: list[Any]) -> None:
    tiles.chosen("kernel", 3, (512, 64), launch)
    assert measured and all(tile.m == 16 for tile in measured)


def test_many_rows_measure_large_tiles(measured: list[Any]) -> None:
    tiles.chosen("kernel", 4096, (512, 64), launch)
    assert len(measured) > 3 and all(tile.m >= 64 for tile in measured)


@pytest.mark.parametrize("kept", [[], [64], [64, 64, 64, 4, 3, 8, 1], [1, 2, 3, 4, 5, 6], ["64"] * 6])
def test_what_is_no_tile_is_measured_again(measured: list[Any], kept: Sequence[Any]) -> None:
    tiles.choices["kernel 1024 512 64"] = kept
    assert tiles.chosen("kernel", 1000, (512, 64), launch).n == 128 and measured


def test_nothing_is_measured_while_a_graph_is_recorded(
    measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert (
        tiles.chosen("kernel", 1000, (512, 64), launch) == tiles.TILES[0]
        and not measured
        and not tiles.choices
    )


def test_no_tile_that_fits_is_an_error(measured: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "_seconds", lambda launch, tile: float("inf"))
    monkeypatch.setattr(tiles.torch.cuda, "get_device_name", lambda: "a small device")
    with pytest.raises(RuntimeError, match="no tile of kernel fits into the shared memory of a small device"):
        tiles.chosen("kernel", 1000, (512, 64), launch)
