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

KILLS = 16

# Forks a process for each job, so that a kill costs no second import of torch. Itself it computes nothing,
# which forking needs. Jobs do without diffusers, which takes seconds to import.
NURSERY = """
import os, signal, sys, traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
import tfmq
# Half of a job's time would go into importing these, once for each.
import torch._dynamo, tfmq.artifact, tfmq.backends.auto, tfmq.jobs.report, tfmq.jobs.workflow, tfmq.targets
from tfmq.recipes.recipe import Calibration
from tfmq.storage.journal import Journal

class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.entry = nn.Conv2d(2, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1))
        self.exit = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x, t):
        hidden = self.entry(x) + self.embed(torch.sin(t[:, None].float() / 100))[:, :, None, None]
        return self.exit(hidden + self.block(hidden))

class Straight:
    def set_timesteps(self, count):
        self.timesteps = torch.linspace(999, 0, count).long()

    def step(self, output, timestep, sample, return_dict=True):
        return SimpleNamespace(prev_sample=sample - output / len(self.timesteps))

def job(directory):
    torch.manual_seed(0)
    denoiser = tfmq.Denoiser(Denoiser().eval(), sample="x", timestep="t")
    recipe = tfmq.scheme("w4a8")
    recipe = replace(
        recipe,
        calibration=Calibration(samples=4, steps=3, interval=1, batch_size=4),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=4)),
    )
    sampler = tfmq.LoopSampler(denoiser, Straight(), shape=(2, 8, 8))
    tfmq.quantize(sampler, recipe, output_dir=directory, resume=True)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def kill_at(point, place):
    # Right after the finished model got its name, or once that many files of the job's folder were removed.
    replace_path, unlink = Path.replace, os.unlink
    left = [int(place)]

    def replaced(self, target):
        found = replace_path(self, target)
        if self.name.endswith(".partial"):
            die()
        return found

    def unlinked(path, *args, **kwargs):
        unlink(path, *args, **kwargs)
        left[0] -= removing[0]
        if left[0] == 0:
            die()

    removing = [0]
    remove = Journal.remove

    def removed(self):
        removing[0] = 1
        remove(self)
        die()

    if point == "rename":
        Path.replace = replaced
    if point == "removal":
        os.unlink, Journal.remove = unlinked, removed

for line in sys.stdin:
    directory, point, place = line.rstrip().split("|")
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            kill_at(point, place)
            job(Path(directory))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
os._exit(0)
"""


class Nursery:
    """Starts jobs and says how they ended."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self.commands, self.answers = process.stdin, process.stdout

    def run(
        self,
        directory: Path,
        *,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] | None = None,
        kill_at: tuple[str, int] = ("", 0),
    ) -> int:
        """Run a job and return its exit status; it is killed after `kill_after` seconds or `kill_when`
        something holds, if it still runs.

        Or it kills itself at a point that no clock hits: see `kill_at` of the nursery.
        """
        self.commands.write(f"{directory}|{kill_at[0]}|{kill_at[1]}\n")
        self.commands.flush()
        child = int(self.answers.readline())
        if kill_when is not None:
            while not kill_when():
                time.sleep(0.0005)
        if kill_after is not None or kill_when is not None:
            time.sleep(kill_after or 0)
            # Its parent waits for it, so that the number cannot belong to another process yet, unless the job
            # is over.
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        return int(self.answers.readline())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as child:
        yield Nursery(child)
        assert child.stdin is not None
        child.stdin.close()


def checksums(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def expected(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the checksums of what a job that nobody kills ends in."""
    directory = tmp_path_factory.mktemp("whole") / "model"
    assert nursery.run(directory) == 0
    return checksums(directory)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_jobs_killed_at_random_moments_end_in_the_same_bytes(
    nursery: Nursery, expected: dict[str, str], tmp_path: Path
) -> None:
    began = time.monotonic()
    assert nursery.run(tmp_path / "again") == 0
    whole = time.monotonic() - began
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
    assert {path.name for path in tmp_path.iterdir()} == {"again", *map(str, range(finished))}, (
        "no job and no half-written file is left"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_recording_that_was_killed_begins_anew(
    nursery: Nursery, expected: dict[str, str], tmp_path: Path
) -> None:
    """What an unfinished recording left would else be calibrated on too, or in the place of what belongs
    there.
    """
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
    assert checksums(tmp_path / "job") == expected


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_jobs_killed_once_the_model_is_there_end_in_the_same_bytes(
    nursery: Nursery, expected: dict[str, str], tmp_path: Path
) -> None:
    """Right after the final rename, after each of the first files of the job's folder that are removed, and
    after the last one.
    """
    for number, point in enumerate([("rename", 0), *(("removal", count) for count in (1, 2, 5, 10**6))]):
        directory, job = tmp_path / f"{number}", tmp_path / f"{number}.job"
        assert nursery.run(directory, kill_at=point) == -signal.SIGKILL
        assert checksums(directory) == expected and job.exists() == (point[1] < 10**6)
        assert nursery.run(directory) == 0
        assert checksums(directory) == expected
    assert {path.name for path in tmp_path.iterdir()} == set(map(str, range(5)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_half_written_files_of_a_killed_job_go_when_it_is_resumed(nursery: Nursery, tmp_path: Path) -> None:
    job = tmp_path / "job.job"
    assert (
        nursery.run(tmp_path / "job", kill_when=lambda: (job / "calibration.safetensors").exists())
        == -signal.SIGKILL
    )
    orphans = [
        job / ".activations.safetensors.0123456789ab.tmp",
        job / "calibration" / ".call_00000.safetensors.ffffffffffff.tmp",
    ]
    for orphan in orphans:
        orphan.write_bytes(b"half")
    assert (
        nursery.run(tmp_path / "job", kill_when=lambda: not any(orphan.exists() for orphan in orphans))
        == -signal.SIGKILL
    )
    assert list(job.rglob("calibration.safetensors")), "it went on where it was"
