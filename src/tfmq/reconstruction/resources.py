"""Limits of the memory and the time that a quantization may take."""

from dataclasses import dataclass
from math import inf
from pathlib import Path

from tfmq.allocator import return_freed

# Share of `max_memory` that captured calls and targets may use. Solvers and the network get the rest.
CAPTURED = 0.25
# Share of the free memory that captured calls may use where no limit was given.
UNASKED = 0.5

MEMINFO, GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Return the memory that this process could still take: the machine's, or what its control group (a
    container's) leaves. None where unknown.
    """
    if not MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines() if ":" in line)
    free = [int(fields["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in fields else []
    limit, used = (
        (GROUP / name).read_text().strip() if (GROUP / name).exists() else ""
        for name in ("memory.max", "memory.current")
    )
    if limit.isdigit() and used.isdigit():
        free.append(max(0, int(limit) - int(used)))
    return min(free, default=None)


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Limits of a job; None sets none, but for captured calls, which go to files before they fill the
    machine.

    Attributes:
        max_memory: bytes that calibration may hold beyond what the process held before, the model included.
            The result does not depend on it, unless scales are tuned: gradients are then taken of as many
            samples together as find room.
        time_budget: seconds of the whole job, which units share; the result is that of the shares that were
            decided.
    """

    max_memory: int | None = None
    time_budget: float | None = None

    def __post_init__(self) -> None:
        if self.max_memory is not None and self.max_memory < 1:
            raise ValueError(f"max_memory is a number of bytes, at least 1, got {self.max_memory}")

        if self.time_budget is not None and not 0 < self.time_budget < inf:
            raise ValueError(f"time_budget is a number of seconds above 0, got {self.time_budget}")

    @property
    def captured(self) -> int | None:
        """Return the bytes of captured calls that may stay in memory; without a limit half of what is free,
        and None where nobody knows that.
        """
        if self.max_memory is not None:
            return int(CAPTURED * self.max_memory)
        free = free_bytes()
        return None if free is None else int(UNASKED * free)

    def sites_at_once(self, bytes_each: int) -> int | None:
        """Return the number of activation quantizers whose inputs may be looked at in one pass."""
        return None if self.max_memory is None else max(1, int(CAPTURED * self.max_memory) // bytes_each)

    def prepare(self) -> None:
        """Make this process return freed memory to the system where there is a limit. Without that, freed
        memory is most of what it holds.
        """
        if self.max_memory is not None:
            return_freed()

    def check(self, name: str, needed: int) -> None:
        """Refuse a solver that needs more than there is.

        Raises:
            ValueError: names the unit and the smallest limit that serves it.
        """
        if self.max_memory is not None and needed > (1 - CAPTURED) * self.max_memory:
            least = int(needed / (1 - CAPTURED)) // 2**20 + 1
            raise ValueError(
                f"{name} cannot be rounded within {self.max_memory / 2**20:.0f} MiB: "
                f"its solver needs a limit of at least {least} MiB; raise "
                "--max-memory, or lower rounding.widest of the recipe"
            )


UNLIMITED = Resources()
