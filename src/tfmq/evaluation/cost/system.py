"""What the operating system knows of this process and of the others: memory, processor time, the machine. Linux; elsewhere what there is."""

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

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


def resident_bytes() -> int:
    """Return the memory that this process holds now; where only the peak is known, that."""
    return _status("VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process has held.

    `VmHWM` where there is one: `ru_maxrss` starts with the size of the process that started this one.
    """
    known = _status("VmHWM")
    if known is not None:
        return known
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def foreign_seconds() -> float:
    """Return the processor seconds, since some moment, of everything but this process on the processors that it may use.

    Time that a hypervisor gave to other machines counts. 0 where there is no `/proc/stat`: contamination goes unseen there.
    """
    if not STAT.exists():
        return 0.0
    wanted = {f"cpu{number}" for number in processors()}
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name in wanted:
            user, nice, system, _, _, interrupt, soft, steal = (int(value) for value in (*fields, *["0"] * 8)[:8])
            ticks += user + nice + system + interrupt + soft + steal
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK") - own.user - own.system


def describe_machine(threads: int) -> dict[str, Any]:
    """Return what figures depend on: processor, instructions, memory, versions, and the number of threads."""
    info = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    parts = (line.partition(":") for line in reversed(info))
    fields = {name.strip(): value.strip() for name, _, value in parts}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else None
    return {
        "processor": fields.get("model name") or platform.processor() or platform.machine(),
        "instructions": [flag for flag in FLAGS if flag in flags],
        "processors": len(processors()),
        "threads": threads,
        "memory_bytes": pages,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(), **{name: version for name in PACKAGES if (version := _version(name))}},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
