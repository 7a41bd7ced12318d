"""`tfmq analyze`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

parquet = pytest.importorskip(
    "pyarrow.parquet", reason="pyarrow is not installed; pip install 'tfmq[parquet]' has it"
)
Run = Callable[..., Any]


def test_values_and_files(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    command = (
        "analyze",
        quantized,
        "--reference",
        model,
        "--num-images",
        2,
        "--thorough",
        "--backend",
        "simulated",
        "--output-dir",
        tmp_path / "a",
    )
    result = tfmq(*command, "--json")
    assert result.status == 0, result.err
    report = json.loads((quantized / "tfmq_report.json").read_text())
    count = len(result.json["sensitivity"]["parts"])
    expected = {
        "num_images": 2,
        "steps": 4,
        "seed": 0,
        "thorough": True,
        "calls": 8,
        "parts": count,
        "of_parts": count,
    }
    expected |= {"backend": "simulated", "layers_backend": "simulated", "weights": report["sha256"]}
    assert result.json["settings"] == expected
    assert result.json["disturbance"]["mismatches"] == report["temporal"]["mismatches"]
    found = {part["name"] for part in result.json["sensitivity"]["parts"]}
    assert found >= {unit["name"] for unit in report["units"]} and "temporal layers" in found
    stored = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert {"output_dir": str(tmp_path / "a"), **stored} == result.json
    assert len(list((tmp_path / "a").glob("*.png"))) == 6
    assert not (tmp_path / "a" / "analysis.parquet").exists()


def test_what_is_refused(tfmq: Run, model: Path, grey_model: Path, quantized: Path, tmp_path: Path) -> None:
    for arguments, cause in (
        ((model, model), "holds no model quantized"),
        ((quantized, quantized), "quantized itself"),
        ((quantized, grey_model), ""),
    ):
        result = tfmq(
            "analyze",
            arguments[0],
            "--reference",
            arguments[1],
            "--num-images",
            1,
            "--output-dir",
            tmp_path / "a",
        )
        assert (
            result.status == 1 and cause in result.err and result.err.splitlines()[-1].startswith("error: ")
        )
    assert list(tmp_path.iterdir()) == []


def test_a_quick_look_says_what_it_leaves_out_and_writes_a_table(
    tfmq: Run, model: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the time that it will take, as other verbs say theirs in test_outcome.py."""
    monkeypatch.setattr("tfmq.cli.progress.SHORT", 0.0)
    command = (
        "analyze",
        quantized,
        "--reference",
        model,
        "--backend",
        "simulated",
        "--output-dir",
        tmp_path / "a",
    )
    shown = tfmq(*command, "--parquet")
    assert shown.status == 0 and "everything quantized" in shown.out and "conv_in" in shown.out, shown.err
    assert sum(line.startswith("about ") for line in shown.err.splitlines()) == 1, shown.err
    stored = json.loads((tmp_path / "a" / "analysis.json").read_text())
    settings, parts = stored["settings"], stored["sensitivity"]["parts"]
    assert (
        settings["parts"] == len(parts) == 8 < settings["of_parts"]
        and settings["num_images"] == 1
        and not settings["thorough"]
    )
    assert f"8 of {settings['of_parts']} units, evenly spread, at 2 calls" in " ".join(shown.out.split())
    table = parquet.read_table(tmp_path / "a" / "analysis.parquet")
    assert json.loads(table.schema.metadata[b"tfmq"]) == settings and {"layers", "sensitivity"} < set(
        table["part"].to_pylist()
    )
