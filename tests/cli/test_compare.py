"""`tfmq compare`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

Run = Callable[..., Any]
KEYS = {"scheme", "num_images", "psnr_db", "ssim", "bytes", "temporal", "steps", "seed", "backend"}


def test_metrics_and_files(compared: Any, quantized: Path) -> None:
    metrics = compared.json
    assert (
        metrics.keys() == KEYS
        and metrics["num_images"] == 2
        and metrics["steps"] == 4
        and metrics["scheme"] == "quick"
        and metrics["backend"] == "simulated"
    )
    assert (
        metrics["psnr_db"].keys() == {"mean", "min"}
        and 0 < metrics["psnr_db"]["min"] <= metrics["psnr_db"]["mean"] < 100
    )
    assert 0 < metrics["ssim"] < 1
    assert metrics["temporal"].keys() == {"max_relative_error", "mean_relative_error", "mismatches"}
    report = json.loads((quantized / "tfmq_report.json").read_text())
    assert metrics["temporal"] == pytest.approx(report["temporal"])
    on_disk = sum(path.stat().st_size for path in (quantized / "unet").iterdir())
    assert metrics["bytes"] == {"reference": report["bytes"]["fp32"], "quantized": on_disk}
    assert sorted(p.name for p in compared.directory.iterdir()) == [
        "compare.png",
        "metrics.json",
        "samples.npz",
        "temporal.png",
    ]
    assert json.loads((compared.directory / "metrics.json").read_text()) == metrics


def test_images_are_those_of_sample(
    tfmq: Run, compared: Any, model: Path, quantized: Path, tmp_path: Path
) -> None:
    numbers = ("--num-images", 2, "--seed", 2, "--steps", 4)
    with np.load(compared.directory / "samples.npz") as both:
        drawn = {"reference": both["reference"], "quantized": both["quantized"]}
    for name, source, backend in (
        ("reference", model, ()),
        ("quantized", quantized, ("--backend", "simulated")),
    ):
        assert tfmq("sample", source, *numbers, *backend, "--output-dir", tmp_path / name).status == 0
        with np.load(tmp_path / name / "samples.npz") as alone:
            assert np.array_equal(alone["images"], drawn[name])


def test_again_into_the_same_directory_gives_the_same_bytes(
    tfmq: Run, model: Path, quantized: Path, tmp_path: Path
) -> None:
    command = ("compare", quantized, "--reference", model, "--num-images", 1, "--output-dir", tmp_path / "c")
    first = tfmq(*command)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    assert first.status == 0 and "PSNR" in first.out and "compare.png" in first.out
    assert tfmq(*command).out == first.out
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before


def test_models_that_do_not_belong_together(
    tfmq: Run, model: Path, grey_model: Path, quantized: Path, tmp_path: Path
) -> None:
    for directory, reference, cause in (
        (model, model, "holds no model quantized"),
        (quantized, quantized, "quantized itself"),
        (quantized, grey_model, "shape"),
        (quantized, tmp_path / "nowhere", "does not exist"),
        (tmp_path / "nowhere", model, "not a directory"),
    ):
        result = tfmq(
            "compare", directory, "--reference", reference, "--num-images", 1, "--output-dir", tmp_path / "c"
        )
        assert result.status == 1 and cause in result.err and result.err.count("\n") == 1, (cause, result)
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_file_in_the_output(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = tfmq("compare", quantized, "--reference", model, "--output-dir", tmp_path)
    assert result.status == 1 and "notes.txt" in result.err and result.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_backend_changes_little(
    tfmq: Run, compared: Any, model: Path, quantized: Path, tmp_path: Path
) -> None:
    simulated, numbers = compared.json["psnr_db"]["mean"], ("--num-images", 2, "--batch-size", 2, "--seed", 2)
    command = ("compare", quantized, "--reference", model, *numbers, "--json")
    for name in ("reference", "auto"):
        result = tfmq(*command, "--backend", name, "--output-dir", tmp_path / name)
        assert (
            result.status == 0 and json.loads((tmp_path / name / "metrics.json").read_text()) == result.json
        )
        assert result.json["backend"] == name or name == "auto"
        assert result.json["psnr_db"]["mean"] == pytest.approx(simulated, abs=0.5)
