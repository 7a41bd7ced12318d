"""What a job may hold where nobody set a limit: half of what the machine, or a container, has left."""

from pathlib import Path

import pytest

from tfmq.reconstruction import resources
from tfmq.reconstruction.resources import Resources, free_bytes


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(resources, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "GROUP", tmp_path)
    return tmp_path


def test_nothing_is_known_where_the_system_says_nothing(machine: Path) -> None:
    assert free_bytes() is None and Resources().captured is None
    (machine / "meminfo").write_text("MemTotal: 100 kB\n")
    assert free_bytes() is None, "a kernel without MemAvailable"


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        ("", "", 8 * 2**20),
        ("max", "1", 8 * 2**20),
        (str(2**20), str(2**19), 2**19),
        (str(2**40), "0", 8 * 2**20),
        ("10", "20", 0),
    ],
)
def test_the_tighter_of_machine_and_container_holds(machine: Path, limit: str, used: str, free: int) -> None:
    (machine / "meminfo").write_text("MemTotal: 16384 kB\nMemAvailable:    8192 kB\n")
    if limit:
        (machine / "memory.max").write_text(limit + "\n")
        (machine / "memory.current").write_text(used + "\n")
    assert free_bytes() == free
    assert Resources().captured == free // 2
    assert Resources(max_memory=4096).captured == 1024, "a limit that was given holds alone"


def test_this_machine_has_memory_left() -> None:
    free = free_bytes()
    assert free is None or free > 2**20
