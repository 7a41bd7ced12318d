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
    assert (
        result.status == 2
        and "openvino, onnx, openvino-genai" in result.err
        and not (tmp_path / "e").exists()
    )


@pytest.mark.parametrize("to", ["comfy", "gguf"])
def test_files_of_codes_know_no_halves(tfmq: Run, quantized: Path, tmp_path: Path, to: str) -> None:
    result = tfmq("export", quantized, "--to", to, "--halved", "--output-dir", tmp_path / "e")
    assert result.status == 2 and "holds codes as they are" in result.err and not (tmp_path / "e").exists()


def test_a_full_precision_model_is_refused(tfmq: Run, model: Path, tmp_path: Path) -> None:
    result = tfmq("export", model, "--to", "openvino", "--output-dir", tmp_path / "e")
    assert result.status == 1 and len(result.err.strip().splitlines()) == 1 and not (tmp_path / "e").exists()


def test_genai_is_given_pipelines_that_it_draws_with(tfmq: Run, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    pytest.importorskip("openvino_tokenizers")
    result = tfmq("export", quantized, "--to", "openvino-genai", "--output-dir", tmp_path / "e")
    assert result.status == 1 and "OpenVINO GenAI draws no DDIMPipeline; it draws" in result.err
    assert len(result.err.strip().splitlines()) == 1 and not (tmp_path / "e").exists()


def test_folders_of_another_pipeline_are_not_replaced(tfmq: Run, quantized: Path) -> None:
    before = sorted(path.name for path in quantized.rglob("*"))
    result = tfmq("export", quantized, "--to", "openvino-genai", "--output-dir", quantized)
    assert result.status == 1 and "choose another output directory" in result.err
    assert sorted(path.name for path in quantized.rglob("*")) == before
