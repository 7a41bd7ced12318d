"""Measured tiles on disk: read again by the next process, and never trusted."""

from pathlib import Path

import pytest

from tfmq.backends.tuned import StoredTiles

TILE = [64, 64, 64, 4, 3, 8]


def test_what_was_chosen_is_there_in_the_next_process(tmp_path: Path) -> None:
    path = tmp_path / "new" / "device.json"
    StoredTiles(path)["linear 64 512"] = TILE
    again = StoredTiles(path)
    assert dict(again) == {"linear 64 512": TILE}
    del again["linear 64 512"]
    assert not StoredTiles(path)


def test_two_processes_keep_the_choices_of_both(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    first, second = StoredTiles(path), StoredTiles(path)
    first["a"], second["b"] = TILE, TILE
    assert set(StoredTiles(path)) == {"a", "b"}


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff", b'{"a": 1, "b": ["x"], "c": [true], "d": null}']
)
def test_a_damaged_file_costs_measuring_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "device.json"
    path.write_bytes(content)
    tiles = StoredTiles(path)
    assert not tiles
    tiles["a"] = TILE
    assert dict(StoredTiles(path)) == {"a": TILE}


def test_a_directory_that_cannot_be_written_keeps_choices_in_memory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    tiles = StoredTiles(tmp_path / "file" / "device.json")
    tiles["a"] = TILE
    assert tiles["a"] == TILE and len(tiles) == 1
