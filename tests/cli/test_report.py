"""`tfmq report`."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("plotly")
Run = Callable[..., Any]


def test_the_way_from_a_model_to_its_report(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    shutil.copytree(quantized, tmp_path / "q")
    bare = tfmq("report", tmp_path / "q")
    assert bare.status == 0 and "nothing from tfmq evaluate and analyze" in bare.out
    local = ("--num-images", 3, "--extractor", "pooled-pixels", "--metrics", "fid,psnr")
    assert tfmq("evaluate", tmp_path / "q", "--reference", model, *local).status == 0
    assert tfmq("analyze", tmp_path / "q", "--reference", model, "--num-images", 1).status == 0
    result = tfmq("report", tmp_path / "q", "--base-model", "owner/name", "--json")
    assert result.status == 0, result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q", "q.analysis", "q.evaluation", "q.report"]
    assert sorted(path.name for path in (tmp_path / "q.report").iterdir()) == ["card.md", "report.html"]
    page, card = (Path(result.json[name]).read_text() for name in ("report", "card"))
    assert result.json["bytes"] == len(page.encode()) < 5_000_000
    for text in (page, card):
        assert "fd[pooled-pixels]" in text and "psnr, 3 pairs" in text and "quick" in text
    assert "base_model_relation: quantized" in card and page.count("data:image/png") == 6


def test_a_whole_model_is_pushed_with_its_card(
    tfmq: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[Any] = []
    monkeypatch.setattr(
        "tfmq.integrations.hub.push_folder",
        lambda *a, **k: pushed.append((a, k)) or "https://example.org/me/q",
    )
    shutil.copytree(quantized, tmp_path / "q")
    command = ("report", tmp_path / "q", "--base-model", "owner/name", "--push-to-hub", "me/q")
    result = tfmq(*command, "--json")
    assert result.status == 0 and result.json["pushed_to"] == "https://example.org/me/q"
    ((directory, repository), options) = pushed.pop()
    assert (directory, repository) == (tmp_path / "q", "me/q") and not options["private"]
    assert (
        options["card"] == Path(result.json["card"]).read_text()
        and "base_model_relation: quantized" in options["card"]
    )
    assert (
        'DiffusionPipeline.from_pretrained("me/q")' in options["card"]
        and "from owner/name" in options["card"]
    )
    nameless = tfmq(*command[:2], *command[-2:])
    assert (
        nameless.status == 0 and "name it with --base-model" in nameless.err and "name it" not in result.err
    )
    assert "base_model" not in pushed.pop()[1]["card"]
    weights = next((tmp_path / "q").rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-10])
    assert tfmq(*command).status == 1 and not pushed


def test_a_model_without_a_job_is_told_what_a_report_is_of(
    tfmq: Run, quantized: Path, tmp_path: Path
) -> None:
    imported = shutil.copytree(quantized, tmp_path / "q")
    (imported / "tfmq_report.json").unlink()
    result = tfmq("report", imported, "--output-dir", tmp_path / "r")
    assert result.status == 1 and "models that were imported" in result.err and result.err.count("\n") == 1


def test_what_is_refused(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    for arguments, cause in (
        ((model,), "holds no model quantized"),
        ((tmp_path / "nowhere",), "not a directory"),
        ((quantized, "--evaluation", tmp_path / "nowhere"), "nowhere/evaluation.json does not exist"),
        ((quantized, "--analysis", tmp_path / "nowhere"), "nowhere/analysis.json does not exist"),
        ((quantized, "--bench", tmp_path / "nowhere.json"), "nowhere.json"),
        ((quantized, "--base-model", "no id"), "hub id"),
    ):
        result = tfmq("report", *arguments, "--output-dir", tmp_path / "r")
        assert result.status == 1 and cause in result.err and result.err.count("\n") == 1, (cause, result)
    assert list(tmp_path.iterdir()) == []
