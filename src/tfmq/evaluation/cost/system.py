"""Ask the operating system for memory, processor time and the machine, of this process and of others.
Complete on Linux alone.
"""

import ctypes
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

STATUS, STAT, CPUINFO = Path("/proc/self/status"), Path("/proc/stat"), Path("/proc/cpuinfo")
PACKAGES = ("torch", "diffusers", "openvino", "nncf", "onnxruntime", "torchao", "sdnq", "optimum-quanto")
# Instructions that decide how fast integers are.
FLAGS = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "amx_int8", "avx512_bf16", "asimddp", "i8mm")


def processors() -> tuple[int, ...]:
    """Return the numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _status(field: str) -> int | None:
    if not STATUS.exists():
        return None
    lines = (line.split() for line in STATUS.read_text().splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[:1] == [f"{field}:"]), None)


class _Counters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of Windows."""

    _fields_ = (
        ("cb", ctypes.c_uint32),
        ("PageFaultCount", ctypes.c_uint32),
        *(
            (name, ctypes.c_size_t)
            for name in (
                *("PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage"),
                *("QuotaPeakNonPagedPoolUsage", "QuotaNonPagedPoolUsage", "PagefileUsage"),
                "PeakPagefileUsage",
            )
        ),
    )


def _windows_counters() -> Any:
    """Return the memory that Windows says this process has held and holds; zeros where it does not."""
    counters, process = _Counters(), ctypes.c_void_p(-1)
    counters.cb = ctypes.sizeof(counters)
    ctypes.windll.kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)  # type: ignore[attr-defined]
    return counters


def resident_bytes() -> int:
    """Return the memory that this process holds now; where only the peak is known, that."""
    if os.name == "nt":
        return _windows_counters().WorkingSetSize
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process has held.

    `VmHWM` where there is one: `ru_maxrss` starts with the size of the process that started this one.
    """
    known = _status("VmHWM")
    if known is not None:
        return known
    if os.name == "nt":
        return _windows_counters().PeakWorkingSetSize
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def foreign_seconds() -> float:
    """Return the processor seconds, since some moment, of everything but this process on the processors that
    it may use.

    Time that a hypervisor gave to other machines counts. 0 where there is no `/proc/stat`: contamination goes
    unseen there.
    """
    if not STAT.exists():
        return 0.0
    wanted = {f"cpu{number}" for number in processors()}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _, _, interrupt, soft, steal = (
                int(value) for value in (*fields, *["0"] * 8)[:8]
            )
            ticks += user + nice + system + interrupt + soft + steal
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def memory_bytes() -> int | None:
    """Return the memory of the machine; None where the system does not say."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None


def describe_machine(threads: int, *, device: str = "cpu") -> dict[str, Any]:
    """Return what figures depend on: processor, instructions, memory, versions, the number of threads, and
    the device beside the processor.
    """
    info = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    parts = (line.partition(":") for line in reversed(info))
    fields = {name.strip(): value.strip() for name, _, value in parts}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "processors": len(processors()),
        "threads": threads,
        "memory_bytes": memory_bytes(),
        "accelerator": _accelerator(device),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
    }


def machine_in_words(machine: Mapping[str, Any]) -> str:
    """Return in a line what `describe_machine` found.

    >>> processor = {"processor": "A 1", "instructions": ["avx2"], "threads": 2, "processors": 4}
    >>> machine_in_words({**processor, "versions": {"torch": "2"}, "accelerator": None})
    'A 1 (avx2), 2 threads on 4 processors, torch 2'
    """
    beside = f"{machine['accelerator']} beside " if machine["accelerator"] else ""
    instructions = f" ({', '.join(machine['instructions'])})" if machine["instructions"] else ""
    threads, processors = (
        f"{machine[name]} {name if machine[name] != 1 else name[:-1]}" for name in ("threads", "processors")
    )
    return (
        f"{beside}{machine['processor']}{instructions}, {threads} on "
        f"{processors}, torch {machine['versions']['torch']}"
    )


def _accelerator(device: str) -> str | None:
    """Return the name of a device beside the processor, None for the processor itself."""
    kind = torch.device(device).type
    if kind == "cpu":
        return None
    return torch.cuda.get_device_name(device) if kind == "cuda" else kind


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
