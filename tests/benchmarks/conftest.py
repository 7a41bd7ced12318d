"""The benchmarks' scripts, imported as they import each other, on a model that a test can pay for."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tfmq
from tfmq.models.sampler import LoopSampler
from tfmq.recipes.recipe import Calibration
from tfmq.reconstruction.learning import Learning

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
TINY = ("nearest", "gptq", "adaround-2", "adaround-4")
FUNCTION = """
import torch, tfmq
from diffusers import DDIMScheduler
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.entry, self.exit = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        shift = self.embed(torch.sin(t[:, None].float() / 100))[:, :, None, None]
        return self.exit(nn.functional.silu(self.entry(x) + shift))

def tiny():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = tfmq.Denoiser(Tiny().eval(), sample="x", timestep="t")
    return tfmq.LoopSampler(denoiser, DDIMScheduler(), shape=(3, 8, 8))
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """Return somebody's `FILE.py:FUNCTION` that returns a sampler."""
    (tmp_path / "mine.py").write_text(FUNCTION)
    return f"{tmp_path / 'mine.py'}:tiny"


@pytest.fixture
def solvers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import solvers

    solvers.all_cells = solvers.cells  # type: ignore[attr-defined]
    for budget in (2, 4):
        monkeypatch.setitem(solvers.SOLVERS, f"adaround-{budget}", solvers._learned("adaround", budget))
    monkeypatch.setattr(
        solvers,
        "cells",
        lambda: iter([solvers.Cell("tiny", solver, seed) for seed in (0, 1) for solver in TINY]),
    )
    yield solvers
    for name in {"solvers", "solver_table", "reference", "calibration"} - before:
        sys.modules.pop(name, None)


@pytest.fixture
def models(solvers: ModuleType, sampler: Callable[..., LoopSampler]) -> dict[str, Any]:
    recipe = tfmq.scheme("w4a8")
    recipe = replace(
        recipe,
        calibration=Calibration(samples=2, steps=3, interval=1, batch_size=2),
        learning=Learning(batch_size=2),
        temporal=replace(recipe.temporal, learning=Learning(iterations=2)),
    )
    return {
        "tiny": solvers.Model(
            "tiny", partial(sampler, "plain_rgb"), recipe, num_images=2, trajectories=1, batch_size=2
        )
    }
