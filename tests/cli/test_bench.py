"""`tfmq bench`. Times are the machine's, so no test asserts on one; workers run in this process but for one
test.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tfmq.evaluation.cost import bench, variant
from tfmq.evaluation.cost.process import Worker, WorkerError
from tfmq.evaluation.cost.source import Source
from tfmq.evaluation.cost.timing import Slice
from tfmq.evaluation.cost.variant import VARIANTS, Setting
from tfmq.models.module_file import ModuleFile
from tfmq.storage.atomic import write_tensors

Run = Callable[..., Any]
KEYS = {
    *(
        "backend",
        "model",
        "scheme",
        "batch",
        "ms_per_step",
        "speedup",
        "images_per_second",
        "sqnr_db",
        "load_s",
        "compile_s",
    ),
    *(
        "restart_s",
        "peak_rss_bytes",
        "first_peak_rss_bytes",
        "baseline_rss_bytes",
        "disk_bytes",
        "rounds",
        "rounds_dropped",
        "clean",
    ),
}
MILLISECONDS = {"fp32": 8.0, "simulated": 16.0, "torch": 2.0}


class InProcess:
    """A worker without a process: steps are computed, times are made up. What its variant caches makes later
    starts cheaper.
    """

    def __init__(self, name: str, setting: Setting, *, build: bool = False) -> None:
        setting.folder.mkdir(parents=True, exist_ok=True)
        self.name, self.setting = name, setting

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *error: object) -> None:
        return

    def answer(self) -> dict[str, Any]:
        if self.name == "reference":
            raise WorkerError("ValueError: out of luck")
        self.prepared = VARIANTS[self.name].prepare(self.setting)
        cached = self.setting.folder / "cached"
        numbers = {
            "load_s": 1.0,
            "compile_s": 2.0,
            "peak_rss_bytes": 3_000_000,
            "baseline_rss_bytes": 2_000_000,
        }
        if VARIANTS[self.name].caches and cached.exists():
            numbers |= {"compile_s": 0.5, "peak_rss_bytes": 2_500_000}
        cached.touch()
        return {**numbers, "disk_bytes": self.prepared.disk_bytes}

    @torch.no_grad()
    def ask(self, *, do: str, path: str) -> dict[str, Any]:
        assert do == "outputs"
        write_tensors(
            path, {str(number): self.prepared.step(call) for number, call in enumerate(self.setting.calls())}
        )
        return {}

    def turn(self) -> Slice:
        return Slice(MILLISECONDS[self.name] / 1e3, 0.0)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "Worker", InProcess)


def bench_json(tfmq: Run, *arguments: object) -> dict[tuple[str, int], dict[str, Any]]:
    result = tfmq("bench", *arguments, "--rounds", 1, "--threads", 1, "--json")
    assert result.status == 0, result.err
    assert result.json.keys() == {"machine", "weights", "rows"} and result.json["machine"]["threads"] == 1
    assert all(row.keys() == KEYS for row in result.json["rows"])
    return {(row["backend"], row["batch"]): row for row in result.json["rows"]}


@pytest.mark.usefixtures("in_process")
def test_rows(tfmq: Run, model: Path, quantized: Path) -> None:
    rows = bench_json(
        tfmq, quantized, "--reference", model, "--backends", "simulated,torch", "--batch", "1,2"
    )
    assert list(rows) == [(name, batch) for batch in (1, 2) for name in ("fp32", "simulated", "torch")]
    speedups = {name: rows[name, 2]["speedup"] for name in MILLISECONDS}
    assert speedups == pytest.approx({"fp32": 1.0, "simulated": 0.5, "torch": 4.0})
    full, fast = rows["fp32", 1], rows["torch", 1]
    assert (
        full["sqnr_db"] is None
        and full["scheme"] is None
        and fast["scheme"] == "quick"
        and fast["model"] == "model"
    )
    assert fast["sqnr_db"] == pytest.approx(rows["simulated", 1]["sqnr_db"], abs=0.5) and fast["sqnr_db"] > 3
    assert (
        fast["disk_bytes"]
        == sum(path.stat().st_size for path in (quantized / "unet").iterdir())
        < full["disk_bytes"]
    )
    # Four steps of 2 ms, and what the pipeline takes around them.
    assert 0 < fast["images_per_second"] < 1 / (4 * 0.002)
    assert rows["torch", 2]["images_per_second"] < 2 / (4 * 0.002)


@pytest.mark.usefixtures("in_process")
def test_a_report_takes_what_was_measured_of_its_own_weights(
    tfmq: Run, quantized: Path, other_quantized: Path, tmp_path: Path
) -> None:
    """Two models that differ in their weights alone."""
    (tmp_path / "b.json").write_text(
        tfmq("bench", quantized, "--backends", "torch", "--rounds", 1, "--threads", 1, "--json").out
    )
    report = ("--bench", tmp_path / "b.json", "--output-dir", tmp_path / "r", "--json")
    taken = tfmq("report", quantized, *report)
    assert taken.status == 0, taken.err
    for name in ("report", "card"):
        assert "easured on " in Path(taken.json[name]).read_text()
    refused = tfmq("report", other_quantized, *report)
    assert (
        refused.status == 1
        and "b.json is of a model with sha256" in refused.err
        and refused.err.count("\n") == 1
    )


@pytest.mark.usefixtures("in_process")
def test_what_caches_starts_twice(tfmq: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "torch", replace(VARIANTS["torch"], caches=True))  # type: ignore[type-var]
    rows = bench_json(tfmq, quantized, "--backends", "torch,simulated")
    names = ("load_s", "compile_s", "restart_s", "peak_rss_bytes", "first_peak_rss_bytes")
    assert [rows["torch", 1][name] for name in names] == [1.0, 2.0, 1.5, 2_500_000, 3_000_000]
    assert [rows["simulated", 1][name] for name in names] == [1.0, 2.0, 3.0, 3_000_000, 3_000_000]


@pytest.mark.usefixtures("in_process")
def test_without_a_reference_there_is_speed_and_no_accuracy(tfmq: Run, quantized: Path) -> None:
    rows = bench_json(tfmq, quantized, "--backends", "torch")
    assert rows["torch", 1]["speedup"] == 4.0 and rows["torch", 1]["sqnr_db"] is None
    text = tfmq("bench", quantized, "--backends", "torch", "--rounds", 1, "--threads", 1)
    assert text.status == 0 and "4.00x" in text.out and "Without --reference there is no SQNR" in text.out


@pytest.mark.usefixtures("in_process")
def test_what_is_absent_or_fails_is_left_out_with_a_line(
    tfmq: Run, model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variant, "find_spec", lambda name: None)
    options = ("--backends", "torch,reference", "--peers", "openvino-nncf,quanto-int8")
    result = tfmq("bench", quantized, "--reference", model, *options, "--rounds", 1, "--threads", 1)
    assert result.status == 0
    skipped = [line for line in result.err.splitlines() if line.startswith("skipped: ")]
    assert skipped == [
        "skipped: openvino-nncf needs openvino and nncf; install with: pip install 'tfmq[bench]'",
        "skipped: quanto-int8 needs optimum-quanto; install with: pip install 'tfmq[bench]'",
        "skipped: reference failed at batch 1: ValueError: out of luck",
    ]
    assert "torch" in result.out and "quanto" not in result.out


def test_refusals(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    for directory, reference, cause in (
        (model, model, "holds no model quantized"),
        (quantized, quantized, "quantized itself"),
        (tmp_path / "nowhere", model, "not a directory"),
    ):
        result = tfmq("bench", directory, "--reference", reference)
        assert result.status == 1 and cause in result.err and result.err.count("\n") == 1, (cause, result)


def test_a_process_of_its_own(
    tfmq: Run, model: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One, because it imports diffusers, which takes seconds; test_module.py has several."""
    # diffusers imports these where they are, for seconds; the tiny model needs none of them.
    lacking = 'import sys\nsys.modules |= dict.fromkeys(["peft", "scipy", "transformers"])\n'
    (tmp_path / "sitecustomize.py").write_text(lacking)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    # A turn as short as can be.
    monkeypatch.setattr("tfmq.evaluation.cost.process.TURN", 0.0)

    def worker(name: str, setting: Setting, *, build: bool = False) -> Worker | InProcess:
        return (Worker if name == "torch" else InProcess)(name, setting, build=build)

    monkeypatch.setattr(bench, "Worker", worker)
    row = bench_json(tfmq, quantized, "--reference", model, "--backends", "torch")["torch", 1]
    assert row["ms_per_step"] > 0 and row["rounds"] == 1
    assert row["peak_rss_bytes"] >= row["baseline_rss_bytes"] > 10_000_000
    assert row["load_s"] > 0 and row["compile_s"] > 0


def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    source = Source(
        quantized=None, folder=tmp_path / "none", module=ModuleFile(tmp_path / "none.py", "build")
    )
    setting = Setting(source=source, folder=tmp_path / "w", batch=1, threads=1)
    with Worker("fp32", setting) as worker, pytest.raises(WorkerError, match="Error"):
        worker.answer()
