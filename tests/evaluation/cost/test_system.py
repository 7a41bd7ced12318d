"""What the operating system says."""

import ctypes
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tfmq.evaluation.cost import system
from tfmq.evaluation.cost.roofline import ceilings, operations
from tfmq.models.denoiser import Denoiser, Inputs


def test_the_peak_is_no_less_than_what_is_held() -> None:
    before = system.peak_bytes()
    held = torch.ones(8_000_000)
    assert system.peak_bytes() >= before
    assert system.peak_bytes() >= system.resident_bytes() > 4 * len(held)


def test_own_work_is_not_foreign() -> None:
    before, began, own = system.foreign_seconds(), time.perf_counter(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    elapsed = time.perf_counter() - began
    # Whatever else runs on these processors, it had no more than all of them; our own time is not counted
    # again.
    assert system.foreign_seconds() - before < elapsed * len(system.processors()) - 0.2 + 0.1


def test_without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("STATUS", "STAT", "CPUINFO"):
        monkeypatch.setattr(system, name, system.Path("/nowhere"))
    assert system.foreign_seconds() == 0
    assert system.peak_bytes() > 1_000_000 and system.resident_bytes() > 1_000_000
    assert system.describe_machine(3)["threads"] == 3


def test_memory_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for its function, which gets the structure that the system documents."""

    def answer(process: ctypes.c_void_p, where: Any, size: int) -> int:
        counters = where._obj
        assert size == counters.cb == ctypes.sizeof(counters) == 8 + 8 * ctypes.sizeof(ctypes.c_size_t)
        counters.PeakWorkingSetSize, counters.WorkingSetSize = 300, 200
        return 1

    kernel = SimpleNamespace(kernel32=SimpleNamespace(K32GetProcessMemoryInfo=answer))
    monkeypatch.setattr(ctypes, "windll", kernel, raising=False)
    monkeypatch.setattr(system, "os", SimpleNamespace(name="nt", cpu_count=lambda: 4))
    monkeypatch.setattr(system, "STATUS", system.Path("/nowhere"))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert system.peak_bytes() == 300 and system.resident_bytes() == 200
    assert system.processors() == (0, 1, 2, 3) and system.memory_bytes() is None


def test_a_machine_in_words_names_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = system.describe_machine(1)
    words = system.machine_in_words(found)
    assert (
        words.startswith(found["processor"])
        and ", 1 thread on " in words
        and words.endswith(f"torch {found['versions']['torch']}")
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Accelerator at {device}")
    assert (
        system.machine_in_words(system.describe_machine(1, device="cuda:1"))
        == f"Accelerator at cuda:1 beside {words}"
    )


def test_operations_are_those_of_products_and_convolutions() -> None:
    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.Linear(5, 7)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.linear(self.conv(x)) + t[:, None, None, None]

    call = Inputs(torch.ones(3, 2, 5, 5), torch.ones(3))
    assert operations(Denoiser(Two()), call) == 2 * 3 * (25 * 4 * 2 * 9 + 4 * 5 * 5 * 7)


def test_ceilings_are_rates() -> None:
    found = ceilings(64)
    assert found.fp32 > 0 and (found.int8 is None or found.int8 > 0)
