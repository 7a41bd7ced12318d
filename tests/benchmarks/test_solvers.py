"""The solver benchmark at a size that a test can pay for: cells share their calibration, stay, and go on
where they were.
"""

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tfmq.progress import silent
from tfmq.storage.atomic import read_json

TINY = ("nearest", "gptq", "adaround-2", "adaround-4")


def cells(directory: Path) -> dict[str, Any]:
    return {path.stem: read_json(path) for path in sorted((directory / "cells").glob("*.json"))}


def test_cells_are_measured_kept_and_finished_after_a_kill(
    solvers: ModuleType,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A picture takes as long as a few cells: it is drawn in earnest after the last one alone.
    pictures: list[Path] = []
    draw_curves = solvers.draw_curves
    monkeypatch.setattr(solvers, "draw_curves", lambda summary, path: pictures.append(path))

    def run(only: str = "") -> None:
        solvers.run(models, tmp_path, only=only, device="cpu", command="test", progress=silent)

    run("gptq-0")
    assert list(cells(tmp_path)) == ["tiny-gptq-0", "tiny-nearest-0"], (
        "one cell, and the one that it builds on"
    )
    alone = cells(tmp_path)

    # A kill in the third unit of the next cell.
    base, job = tmp_path / "jobs" / "tiny-nearest-0", tmp_path / "jobs" / "tiny-adaround-2-0"
    model = models["tiny"]

    class Killed(BaseException):
        pass

    def kill(name: str, compute: Callable[[], Any]) -> Any:
        if name == "unit_0002":
            raise Killed
        return compute()

    class Dying(solvers.TimedJournal):  # type: ignore[misc, name-defined]
        def stage(self, name: str, compute: Callable[[], Any]) -> Any:
            return super().stage(name, lambda: kill(name, compute))

    alive, solvers.TimedJournal = solvers.TimedJournal, Dying  # type: ignore[attr-defined]
    with pytest.raises(Killed):
        run("adaround-2-0")
    solvers.TimedJournal = alive  # type: ignore[attr-defined]
    assert (job / "unit_0001.safetensors").exists() and (job / "temporal.safetensors").samefile(
        base / "temporal.safetensors"
    )
    run()
    results = cells(tmp_path)
    assert len(results) == 8 and {name: results[name] for name in alone} == alone, (
        "finished cells stay as they were"
    )
    assert not job.exists() and base.exists()
    assert pictures == 8 * [tmp_path / "solvers.png"], "one after each cell"

    shutil.rmtree(tmp_path / "again", ignore_errors=True)
    solvers.run(
        {"tiny": model},
        tmp_path / "again",
        only="adaround-2-0",
        device="cpu",
        command="test",
        progress=silent,
    )
    whole, resumed = cells(tmp_path / "again")["tiny-adaround-2-0"], results["tiny-adaround-2-0"]
    timeless = {"units", "before_units"}
    assert {k: v for k, v in whole.items() if k not in timeless} == {
        k: v for k, v in resumed.items() if k not in timeless
    }

    written = read_json(tmp_path / "solvers.json")
    assert [row["solver"] for row in written["summary"]] == ["nearest", "gptq", "adaround-2", "adaround-4"]
    assert all(row["seeds"] == [0, 1] for row in written["summary"])
    # Nearest codes need no run of the units.
    assert [row["solver"] for row in written["summary"] if not row["cpu_seconds"]] == ["nearest"]
    text = (tmp_path / "solvers.md").read_text()
    assert text in capsys.readouterr().out and "extrapolated, not measured: AdaRound with 20000" in text
    monkeypatch.setattr(solvers, "draw_curves", draw_curves)
    solvers.write_results(tmp_path, "test")
    assert (tmp_path / "solvers.png").stat().st_size > 10_000


def row(solver: str, iterations: int, seed: int, *, psnr: float, seconds: float) -> dict[str, Any]:
    spent = {"seconds": seconds, "cpu_seconds": seconds}
    quality = {"unit_gain_db": 1.0, "noise_sqnr_db": 2.0, "psnr_db": psnr}
    before = {"seconds": 10.0, "cpu_seconds": 10.0}
    return {
        "model": "m",
        "solver": solver,
        "iterations": iterations,
        "seed": seed,
        **quality,
        "units": spent,
        "before_units": before,
    }


def test_the_bar_compares_equal_seeds_and_extrapolates_time_alone(solvers: ModuleType) -> None:
    import solver_table

    rows = [
        row("gptq", 0, 0, psnr=38.0, seconds=10),
        row("gptq", 0, 1, psnr=50.0, seconds=10),
        row("adaround-100", 100, 0, psnr=36.0, seconds=5),
        row("adaround-5000", 5000, 0, psnr=37.5, seconds=201),
    ]
    bar = solver_table.paired_difference(rows, "m", "gptq")
    assert bar == {
        "iterations": 5000,
        "seeds": [0],
        "psnr_difference_db": 0.5,
        "ratio_units": 20.1,
        "ratio_job": 211 / 20,
    }
    assert solver_table.paired_difference(rows, "m", "gptq-interval2") is None
    line = solver_table.extrapolated(solver_table.aggregate(rows))
    assert (
        line is not None
        and line["cpu_seconds_an_iteration"] == pytest.approx(0.04)
        and line["cpu_seconds"] == pytest.approx(801)
    )
    assert line["gain_of_last_step_db"] == 1.5 and line["before_it"] == 100
    assert (
        solver_table.paired_difference(rows[:2], "m", "gptq") is None
        and solver_table.extrapolated(solver_table.aggregate(rows[:2])) is None
    )


def test_cells_share_the_stages_that_they_would_repeat(solvers: ModuleType, models: Any) -> None:
    base = models["tiny"].recipe
    shared = {name: solvers.same_stages(change(base), base) for name, change in solvers.SOLVERS.items()}
    assert all(same != ("samples" in name) for name, same in shared.items()), (
        "with other images there is another calibration"
    )
    assert solvers.SOLVERS["gptq-interval2"](base).calibration == replace(base.calibration, interval=2)
    assert not solvers.same_stages(replace(base, calibration=replace(base.calibration, samples=3)), base)
    assert not solvers.same_stages(
        replace(base, activations=replace(base.activations, per_step="none")), base
    )


def test_the_bar_is_decided_first(solvers: ModuleType) -> None:
    order = [cell.name for cell in solvers.all_cells()]
    assert (
        order[:4]
        == ["default-nearest-0", "default-gptq-0", "default-gptq-interval2-0", "default-adaround-5000-0"]
        and order[-1] == "default-adaround-20000-0"
    )
    assert len(set(order)) == len(order)
    for seed in (0, 1, 2):
        assert {
            f"default-{name}-{seed}" for name in solvers.SOLVERS if name not in ("adaround-20000", *TINY[2:])
        } <= set(order)
    for name in order:
        model, _, rest = name.partition("-")
        assert order.index(f"{model}-nearest-{rest[-1]}") <= order.index(name), (
            "what others build on comes before them"
        )


LOADED = """
import torch
from diffusers import DDIMScheduler, UNet2DModel

def load_unet():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    return UNet2DModel(sample_size=64, block_out_channels=(32,), layers_per_block=1, **blocks)

def scheduler():
    return DDIMScheduler(num_train_timesteps=300)
"""


def test_the_model_of_a_folder_is_opened(
    solvers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "load.py").write_text(LOADED)
    # The file that opens it puts its folder first, and imports it by a name that others may have.
    monkeypatch.setattr(sys, "path", list(sys.path))
    try:
        sampler = solvers.ddpm64(tmp_path)
    finally:
        sys.modules.pop("load", None)
    assert sampler.shape == (3, 64, 64) and sampler.scheduler.config.timestep_spacing == "leading"
    assert sampler.scheduler.config.num_train_timesteps == 300
