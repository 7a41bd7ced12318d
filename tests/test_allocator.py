"""Memory that goes back to the system, and what was in it."""

import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq.allocator import page_out, paging_out


def resident(tensor: Tensor) -> int:
    """Kilobytes of the mapping around a tensor that are in memory, as Linux counts them."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(edge, 16) for edge in first.split("-"))
            found = low <= tensor.data_ptr() < high
        elif found and first == "Rss:":
            return int(line.split()[1])
    return 0


@pytest.fixture
def read(tmp_path: Path) -> tuple[Tensor, Tensor]:
    """Return a tensor that its file is mapped for, all of it in memory, and a copy of what it holds."""
    if sys.platform != "linux":
        pytest.skip("other systems are not asked")
    expected = torch.randint(0, 255, (2**22,)).to(torch.uint8)
    save_file({"codes": expected}, tmp_path / "codes.safetensors")
    mapped = load_file(tmp_path / "codes.safetensors")["codes"]
    assert torch.equal(mapped, expected)
    if resident(mapped) < 4096:
        pytest.skip("this release of safetensors does not map files")
    return mapped, expected


def test_a_mapped_tensor_leaves_memory_and_is_read_again(read: tuple[Tensor, Tensor]) -> None:
    mapped, expected = read
    before = resident(mapped)
    page_out(mapped)
    assert resident(mapped) < before / 2
    assert torch.equal(mapped, expected)


def test_a_mapped_tensor_leaves_memory_while_it_is_read(read: tuple[Tensor, Tensor]) -> None:
    mapped, expected = read
    before, least = resident(mapped), sys.maxsize
    with paging_out(mapped):
        end = time.monotonic() + 60
        while least > before / 2 and time.monotonic() < end:
            least = min(least, resident(mapped))
        assert torch.equal(mapped, expected)
    assert least <= before / 2 and resident(mapped) < before / 2
    assert torch.equal(mapped, expected)


def test_what_was_written_stays(tmp_path: Path) -> None:
    save_file({"codes": torch.zeros(2**20, dtype=torch.uint8)}, tmp_path / "codes.safetensors")
    for tensor in (
        load_file(tmp_path / "codes.safetensors")["codes"],
        torch.zeros(2**20, dtype=torch.uint8),
        torch.zeros(3),
        torch.zeros(0),
    ):
        tensor += 7
        page_out(tensor)
        assert (tensor == 7).all()
