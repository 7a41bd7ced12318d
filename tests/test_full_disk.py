"""Jobs that run out of disk, or of power, in the middle of any write: nothing is lost, and `resume` ends in
the same bytes.
"""

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

import tfmq
from tfmq.calibration import replay, spool
from tfmq.models.sampler import LoopSampler
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.resources import Resources
from tfmq.storage import atomic
from tfmq.storage.errors import CheckpointError, JobMismatchError, StorageFullError

# How much later each attempt breaks than the one before, in files.
STRIDE = 1


class Small(nn.Module):
    """No more than a temporal layer and two units, since each attempt runs it again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.entry, self.exit = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift = self.embed(torch.sin(t[:, None].float() / 100))[:, :, None, None]
        return self.exit(nn.functional.silu(self.entry(x) + shift))


def small(*, seed: int = 0) -> LoopSampler:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = tfmq.Denoiser(Small().eval())
    return LoopSampler(denoiser, DDIMScheduler(), shape=(2, 8, 8))


@pytest.fixture
def recipe() -> Recipe:
    base = tfmq.scheme("w4a8")
    return replace(
        base,
        calibration=Calibration(samples=2, steps=3, interval=1, batch_size=2),
        learning=Learning(iterations=2, batch_size=2),
        temporal=replace(base.temporal, learning=Learning(iterations=2)),
    )


class PowerCut(BaseException):
    """Ends a job as if the process were gone: nobody catches it."""


def no_space() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """Counts the files that a job writes, and breaks the one with the number `full`: half of it gets
    there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Callable[[], BaseException]) -> None:
        self.writes, self.full, self.failure = 0, -1, failure
        self.broken = ""
        real_sync, real_save, real_file = atomic._sync, replay.save_file, spool.Spool.file

        def sync(path: Path) -> None:
            self.write(path)
            real_sync(path)

        def save(tensors: Any, path: Path) -> None:
            real_save(tensors, path)
            self.write(path)

        def file(own: Any) -> Any:
            self.write(own.directory)
            return real_file(own)

        monkeypatch.setattr(atomic, "_sync", sync)
        monkeypatch.setattr(replay, "save_file", save)
        monkeypatch.setattr(spool.Spool, "file", file)

    def write(self, path: Path) -> None:
        self.writes += 1
        if self.writes == self.full:
            self.broken = path.name
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
            raise self.failure()

    @contextmanager
    def breaking(self, number: int) -> Iterator[None]:
        self.writes, self.full = 0, number
        yield
        self.full = -1


def checksums(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("failure", "seen"), [(no_space, StorageFullError), (PowerCut, PowerCut)], ids=["full", "cut"]
)
def test_a_job_that_breaks_at_any_write_is_continued_to_the_same_bytes(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: Callable[[], BaseException],
    seen: type[BaseException],
) -> None:
    disk, broken = Disk(monkeypatch, failure), set()
    # So little memory for calls that they go to files too.
    monkeypatch.setattr("tfmq.reconstruction.resources.CAPTURED", 1e-6)
    limits = Resources(max_memory=2**26)

    def job(name: str) -> None:
        tfmq.quantize(small(), recipe, output_dir=tmp_path / name, resources=limits, resume=True)

    job("whole")
    expected = checksums(tmp_path / "whole")
    # Each attempt gets further, since finished stages stay, until it ends before the write that would break.
    for attempts in itertools.count():
        with disk.breaking(1 + STRIDE * attempts):
            try:
                job("broken")
                break
            except seen:
                broken.add(disk.broken.strip(".").partition(".")[0].rstrip("0123456789_"))
                assert checksums(tmp_path / "broken") == {}, "a model appears whole or not at all"
    assert checksums(tmp_path / "broken") == expected
    assert attempts >= 8 and {"job", "call", "unit"} <= broken, broken
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "broken"}


@pytest.mark.parametrize("change", ["recipe", "seed", "model"])
def test_a_changed_job_is_refused_with_the_reason(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    disk = Disk(monkeypatch, no_space)
    with disk.breaking(6), pytest.raises(StorageFullError):
        tfmq.quantize(small(), recipe, output_dir=tmp_path / "q", resume=True)
    before = checksums(tmp_path / "q.job")
    other = small(seed=1 if change == "model" else 0)
    changed = (
        replace(recipe, rounding=replace(recipe.rounding, damping=0.5)) if change == "recipe" else recipe
    )
    reason = {
        "recipe": r"recipe\.rounding\.damping was 0\.1 and is 0\.5",
        "seed": "seed was 0 and is 7",
        "model": "model was .* and is",
    }[change]
    with pytest.raises(JobMismatchError, match=reason):
        tfmq.quantize(
            other, changed, output_dir=tmp_path / "q", seed=7 if change == "seed" else 0, resume=True
        )
    assert checksums(tmp_path / "q.job") == before, "what was done stays for who asks for it"


@pytest.mark.parametrize("name", ["unit_0001.safetensors", "activations.safetensors"])
def test_a_stage_that_a_broken_disk_cut_short_is_an_error_and_no_wrong_model(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr("tfmq.jobs.workflow.pack_all", stop)
        tfmq.quantize(small(), recipe, output_dir=tmp_path / "q")
    path = tmp_path / "q.job" / name
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=name):
        tfmq.quantize(small(), recipe, output_dir=tmp_path / "q", resume=True)
    # Without the damaged stage it is made again.
    path.unlink()
    tfmq.quantize(small(), recipe, output_dir=tmp_path / "q", resume=True)
    assert (tmp_path / "q").is_dir() and not (tmp_path / "q.job").exists()
