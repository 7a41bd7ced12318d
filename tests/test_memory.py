"""A limit of memory: kept by real processes, and without a trace in the result."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tfmq
from tfmq.models.sampler import LoopSampler
from tfmq.recipes.recipe import Calibration, Recipe
from tfmq.reconstruction import resources
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.resources import Resources
from tfmq.reconstruction.solvers import SOLVERS

MIB = 2**20
# Prints for each limit what a process of its own held at most while it quantized, beyond what it had held
# before, and the digest of the result. The processes are forks of one that has imported all of it, which
# diffusers is no part of.
JOB = """
import json, multiprocessing, os, sys
from dataclasses import replace
from types import SimpleNamespace
import torch._dynamo
from torch import nn
import tfmq
import tfmq.artifact, tfmq.jobs.report, tfmq.jobs.workflow, tfmq.targets
from tfmq.evaluation.cost.system import peak_bytes, resident_bytes
from tfmq.recipes.recipe import Calibration
from tfmq.reconstruction.resources import Resources

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 48)
        self.entry = nn.Conv2d(3, 48, 3, padding=1)
        blocks = ((nn.Conv2d(48, 48, 1), nn.SiLU(), nn.Conv2d(48, 48, 1)) for _ in range(2))
        self.blocks = nn.ModuleList(nn.Sequential(*block) for block in blocks)
        self.exit = nn.Conv2d(48, 3, 3, padding=1)

    def forward(self, x, t):
        hidden = self.entry(x) + self.embed(torch.sin(t[:, None].float() / 100))[:, :, None, None]
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.exit(hidden)

class Straight:
    def set_timesteps(self, count):
        self.timesteps = torch.linspace(999, 0, count).long()

    def step(self, output, timestep, sample, return_dict=True):
        return SimpleNamespace(prev_sample=sample - output / len(self.timesteps))

def quantize(limit):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    denoiser = tfmq.Denoiser(Net().eval(), sample="x", timestep="t")
    sampler = tfmq.LoopSampler(denoiser, Straight(), shape=(3, 48, 48))
    recipe = tfmq.scheme("w4a8")
    recipe = replace(
        recipe,
        calibration=Calibration(samples=8, steps=4, interval=1, batch_size=4),
        learning=replace(recipe.learning, batch_size=8),
        temporal=replace(recipe.temporal, learning=replace(recipe.temporal.learning, iterations=2)),
    )
    sampler.run(range(4), steps=1, seed=9)
    before = resident_bytes()
    report = tfmq.quantize(sampler, recipe, resources=Resources(max_memory=limit)).report
    print(json.dumps({"held": peak_bytes() - before, "sha256": report["sha256"]}))

for limit in sys.argv[1:]:
    process = multiprocessing.get_context("fork").Process(target=quantize, args=(int(limit) or None,))
    process.start()
    process.join()
    if process.exitcode:
        os._exit(process.exitcode)
os._exit(0)
"""


def run(*limits: int) -> list[dict[str, int]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", JOB, *map(str, limits)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from /proc")
def test_a_process_stays_within_its_limit_and_ends_in_the_same_bytes() -> None:
    limit = 88 * MIB
    free, capped = run(0, limit)
    assert capped["sha256"] == free["sha256"]
    assert capped["held"] <= limit < free["held"]


@pytest.fixture
def recipe() -> Recipe:
    base = tfmq.scheme("w4a8")
    return replace(
        base,
        calibration=Calibration(samples=2, steps=2, interval=1, batch_size=1),
        learning=Learning(iterations=3, learning_rate=1e-2, batch_size=2),
        temporal=replace(base.temporal, learning=Learning(iterations=2)),
    )


# The larger model takes a while: one solver that learns, and one that does not.
@pytest.mark.parametrize(
    ("name", "solver"), [*(("plain", solver) for solver in SOLVERS), ("sd3", "gptq"), ("sd3", "adaround")]
)
def test_every_solver_gives_the_same_bytes_from_files(
    sampler: Callable[..., LoopSampler],
    recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    solver: str,
) -> None:
    recipe = replace(recipe, rounding=replace(recipe.rounding, solver=solver))

    def digest(limits: Resources) -> str:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler() if name == "sd3" else DDIMScheduler()
        return str(
            tfmq.quantize(sampler(name, scheduler=scheduler), recipe, resources=limits).report["sha256"]
        )

    free = digest(Resources())
    # So little that every call goes to a file and every quantizer has a pass of its own.
    monkeypatch.setattr(resources, "CAPTURED", 1e-6)
    assert digest(Resources(max_memory=64 * MIB)) == free


def test_a_solver_that_cannot_fit_is_refused_by_name(
    sampler: Callable[..., LoopSampler], recipe: Recipe
) -> None:
    # Units come after the calibration, which is as short as can be.
    gptq = replace(
        recipe,
        rounding=replace(recipe.rounding, solver="gptq"),
        calibration=Calibration(samples=1, steps=1, interval=1, batch_size=1),
    )
    with pytest.raises(
        ValueError,
        match=(
            r"cannot be rounded within 1 MiB: its solver needs a limit of at least "
            r"\d+ MiB; raise --max-memory, or lower rounding.widest"
        ),
    ):
        tfmq.quantize(sampler("unet"), gptq, resources=Resources(max_memory=MIB))


@pytest.mark.parametrize("wrong", [0, -5])
def test_no_memory_is_no_limit(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"max_memory.*{wrong}"):
        Resources(max_memory=wrong)
