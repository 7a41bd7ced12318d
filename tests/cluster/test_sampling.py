"""Images do not depend on who draws them."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from tfmq.cluster.crew import Cluster, connected
from tfmq.cluster.sampling import draw as draw_together
from tfmq.evaluation.sampling import draw
from tfmq.progress import Advance

OPTIONS: dict[str, Any] = {"steps": 3, "seed": 5, "batch_size": 3}


def descendants(root: int) -> dict[int, str]:
    """Return the command lines of the processes that `root` started, and of those that they started."""
    parents, names = {}, {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
    found = {root}
    while grown := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= grown
    return {pid: names[pid] for pid in found - {root}}


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_draws_the_same_bytes(
    ray: Any, open_model: Callable[[], Any], workers: int
) -> None:
    with connected(Cluster(workers=workers)) as crew:
        images = draw_together(crew, open_model, 10, **OPTIONS)
    assert images.dtype == np.uint8
    assert_array_equal(images, draw(open_model(), 10, **OPTIONS))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the test finds worker processes in /proc")
def test_a_worker_that_is_killed_changes_nothing(ray: Any, open_model: Callable[[], Any]) -> None:
    killed: list[int] = []

    def kill_one() -> None:
        """Kill a worker in the middle of a batch: it is named after what it does."""
        ends = time.monotonic() + 30
        while not killed and time.monotonic() < ends:
            for pid, name in descendants(os.getpid()).items():
                if name.startswith("ray::_perform"):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return

    @contextmanager
    def progress(description: str, total: int) -> Iterator[Advance]:
        def advance(amount: int = 1) -> None:
            if not killed:
                kill_one()

        yield advance

    with connected(Cluster()) as crew:
        images = draw_together(crew, open_model, 8, steps=40, seed=5, batch_size=2, progress=progress)
    assert len(killed) == 1
    assert_array_equal(images, draw(open_model(), 8, steps=40, seed=5, batch_size=2))
