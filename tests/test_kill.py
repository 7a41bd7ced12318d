"""Jobs killed at any moment, for real, and resumed: the same bytes as without."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest

KILLS = 24

# Forks a process for each job, so that a kill costs no second import of torch. Itself it computes nothing, which forking needs.
NURSERY = """
import os, sys, traceback
from dataclasses import replace
from pathlib import Path
import torch
from diffusers import DDIMScheduler
from torch import nn
import tfmq
from tfmq.recipes.recipe import Calibration

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.entry = nn.Conv2d(2, 8, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1)) for _ in range(2))
        self.exit = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t):
        hidden = self.entry(x) + self.embed(torch.sin(t[:, None].float() / 100))[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.exit(hidden)

def job(directory):
    torch.manual_seed(0)
    denoiser = tfmq.Denoiser(Denoiser().eval(), sample="x", timestep="t")
    recipe = tfmq.scheme("w4a8")
    recipe = replace(
        recipe,
        calibration=Calibration(samples=4, steps=3, interval=1, batch_size=2),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=20)),
    )
    tfmq.quantize(tfmq.LoopSampler(denoiser, DDIMScheduler(), shape=(2, 8, 8)), recipe, output_dir=directory, resume=True)

for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            job(Path(line.strip()))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


class Nursery:
    """Starts jobs and says how they ended."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self.commands, self.answers = process.stdin, process.stdout

    def run(self, directory: Path, *, kill_after: float | None = None, kill_when: Callable[[], bool] | None = None) -> int:
        """Run a job and return its exit status; it is killed after `kill_after` seconds or `kill_when` something holds, if it still runs."""
        self.commands.write(f"{directory}\n")
        self.commands.flush()
        child = int(self.answers.readline())
        if kill_when is not None:
            while not kill_when():
                pass
        if kill_after is not None or kill_when is not None:
            time.sleep(kill_after or 0)
            # Its parent waits for it, so that the number cannot belong to another process yet, unless the job is over.
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.answers.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    pytest.importorskip("diffusers")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        yield Nursery(child)
        assert child.stdin is not None
        child.stdin.close()


def checksums(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_jobs_killed_at_random_moments_end_in_the_same_bytes(nursery: Nursery, tmp_path: Path) -> None:
    assert nursery.run(tmp_path / "whole") == 0
    began = time.monotonic()
    assert nursery.run(tmp_path / "again") == 0
    whole = time.monotonic() - began
    expected = checksums(tmp_path / "whole")
    assert checksums(tmp_path / "again") == expected
    moments, kills, finished, status = random.Random(0), 0, 0, 0
    while kills < KILLS or status:
        directory = tmp_path / f"{finished}"
        status = nursery.run(directory, kill_after=moments.uniform(0, 0.7 * whole) if kills < KILLS else None)
        assert status in (0, -signal.SIGKILL)
        kills += status != 0
        if status == 0:
            assert checksums(directory) == expected
            finished += 1
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "again", *map(str, range(finished))}, "no job and no half-written file is left"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_recording_that_was_killed_begins_anew(nursery: Nursery, tmp_path: Path) -> None:
    """What an unfinished recording left would else be calibrated on too, or in the place of what belongs there."""
    assert nursery.run(tmp_path / "whole") == 0
    job = tmp_path / "job.job"

    def stages() -> list[Path]:
        return list(job.glob("calibration.*"))

    def recording() -> bool:
        return len(list(job.glob("calibration/call_*"))) > 1 or bool(stages())

    kills = 0
    while kills < 3:
        status = nursery.run(tmp_path / "job", kill_when=recording)
        assert status in (0, -signal.SIGKILL)
        if stages() or status == 0:
            # Too late: the recording was over before it was seen.
            shutil.rmtree(job, ignore_errors=True)
            shutil.rmtree(tmp_path / "job", ignore_errors=True)
        kills += not stages() and status != 0
        for call in job.glob("calibration/call_*"):
            # What is left of an unfinished recording may be anything.
            call.write_bytes(b"half")
    assert nursery.run(tmp_path / "job") == 0
    assert checksums(tmp_path / "job") == checksums(tmp_path / "whole")
