"""`tfmq export`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def test_files(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    result = tfmq("export", quantized, "--to", "openvino", "--output-dir", tmp_path / "e", "--json")
    assert result.status == 0, result.err
    assert sorted(path.name for path in (tmp_path / "e").iterdir()) == [
        "denoiser.bin",
        "denoiser.xml",
        "tfmq_export.json",
    ]
    assert result.json["to"] == "openvino" and [port["name"] for port in result.json["inputs"]] == [
        "sample",
        "timestep",
    ]


def test_an_unknown_target_is_a_usage_error(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    result = tfmq("export", quantized, "--to", "tflite", "--output-dir", tmp_path / "e")
    assert result.status == 2 and "openvino, onnx" in result.err and not (tmp_path / "e").exists()


def test_a_full_precision_model_is_refused(tfmq: Run, model: Path, tmp_path: Path) -> None:
    result = tfmq("export", model, "--to", "openvino", "--output-dir", tmp_path / "e")
    assert result.status == 1 and len(result.err.strip().splitlines()) == 1 and not (tmp_path / "e").exists()
