"""Every verb on a module that neither tfmq nor diffusers knows, named by the file and function that give its
sampler.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def spec(own: Path, function: str = "build") -> tuple[object, ...]:
    return ("--module", f"{own / 'own.py'}:{function}")


def test_the_original_and_what_was_made_of_it_are_looked_at(tfmq: Run, own: Path, made: Path) -> None:
    before, after = tfmq("inspect", *spec(own), "--json"), tfmq("inspect", made, *spec(own), "--json")
    assert (
        before.status == 0 and before.json["family"] == "Own" and before.json["bytes"]["quantized"] is None
    ), before.err
    assert after.status == 0 and after.json["units"] == before.json["units"], after.err
    on_disk = sum(path.stat().st_size for path in made.iterdir())
    assert after.json["bytes"] == {"fp32": before.json["bytes"]["fp32"], "quantized": on_disk}
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in after.json["layers"]} == {(4, 8)}
    assert [layer["depends_on"] for layer in after.json["temporal"]] == [["kind", "timestep"]]


def test_images_are_drawn_with_both(tfmq: Run, own: Path, made: Path, tmp_path: Path) -> None:
    import numpy as np

    for number, model in enumerate(((), (made,))):
        result = tfmq(
            "sample",
            *model,
            *spec(own),
            "--num-images",
            3,
            "--steps",
            4,
            "--output-dir",
            tmp_path / str(number),
            "--json",
        )
        assert result.status == 0 and (result.json["backend"] is None) is (number == 0), result.err
    full, low = (np.load(tmp_path / name / "samples.npz")["images"].astype(float) for name in ("0", "1"))
    assert full.shape == low.shape == (3, 16, 16, 3) and 0 < np.abs(full - low).mean() < 30


def test_steps_are_those_of_the_calibration(tfmq: Run, own: Path, made: Path, tmp_path: Path) -> None:
    result = tfmq("compare", made, *spec(own), "--num-images", 2, "--output-dir", tmp_path / "c", "--json")
    assert result.status == 0 and result.json["steps"] == 4 and result.json["scheme"] == "quick", result.err


def test_values_and_report(tfmq: Run, own: Path, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    evaluated = tfmq(
        "evaluate",
        made,
        *spec(own),
        "--num-images",
        4,
        "--num-pairs",
        2,
        "--metrics",
        "kid,psnr",
        "--extractor",
        "pooled-pixels",
        "--output-dir",
        tmp_path / "e",
        "--json",
    )
    assert evaluated.status == 0 and {row["model"] for row in evaluated.json["rows"]} == {"quantized"}, (
        evaluated.err
    )
    assert evaluated.json["protocol"]["quantized"]["sampler"]["per_image"]["tensors"] == ["kind"]
    analysed = tfmq("analyze", made, *spec(own), "--output-dir", tmp_path / "a", "--json")
    assert analysed.status == 0 and analysed.json["trajectory"]["mean"][-1] > 0, analysed.err
    given = ("--evaluation", tmp_path / "e", "--analysis", tmp_path / "a")
    reported = tfmq("report", made, *spec(own), *given, "--output-dir", tmp_path / "r", "--json")
    assert reported.status == 0, reported.err
    card = (tmp_path / "r" / "card.md").read_text()
    assert "from own import build" in card and "DiffusionPipeline" not in card
    wrong = tfmq("report", made, *spec(own, "other"), "--output-dir", tmp_path / "w")
    assert (
        wrong.status == 1 and "does not fit the architecture" in wrong.err and not (tmp_path / "w").exists()
    )


def test_time_is_measured_in_processes_that_open_the_file_themselves(
    tfmq: Run, own: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Turns as short as can be: a busy machine has six of them.
    monkeypatch.setattr("tfmq.evaluation.cost.process.TURN", 0.0)
    result = tfmq(
        "bench", made, *spec(own), "--backends", "simulated", "--rounds", 1, "--threads", 1, "--json"
    )
    assert result.status == 0, result.err
    rows = result.json["rows"]
    assert [row["backend"] for row in rows] == ["fp32", "simulated"] and rows[1]["sqnr_db"] > 5
    assert rows[0]["speedup"] == 1.0
    for row in rows:
        assert row["ms_per_step"] > 0 and row["rounds"] == 1
        assert row["peak_rss_bytes"] >= row["baseline_rss_bytes"] > 10_000_000
        assert row["load_s"] > 0 and row["compile_s"] > 0


def test_a_graph_is_written(tfmq: Run, own: Path, made: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    result = tfmq("export", made, *spec(own), "--to", "openvino", "--output-dir", tmp_path / "x", "--json")
    assert result.status == 0 and [port["name"] for port in result.json["inputs"]] == [
        "noisy_pixels",
        "when",
        "kind",
    ], result.err


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("own.py:nothing", "has no function nothing"),
        ("own.py:KEPT", "has no function KEPT"),
        ("own.py:broken", "broken of .*own.py raised RuntimeError: no weights at hand"),
        ("own.py:number", "returned a int, which is no sampler: it has no denoiser, run, example, describe"),
        ("damaged.py:build", "damaged.py raised ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("absent.py:build", "absent.py does not exist"),
    ],
)
def test_a_file_that_gives_no_sampler_is_refused(tfmq: Run, own: Path, where: str, words: str) -> None:
    import re

    result = tfmq("inspect", "--module", own / where)
    assert (
        result.status == 1
        and result.err.startswith("error: ")
        and result.err.count("\n") == 1
        and re.search(words, result.err)
    ), result.err


def test_a_function_that_keeps_its_module_is_told(tfmq: Run, own: Path, made: Path, tmp_path: Path) -> None:
    result = tfmq("compare", made, *spec(own, "same"), "--num-images", 1, "--output-dir", tmp_path / "c")
    assert result.status == 1 and "build the full-precision one at each call" in result.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("inspect --module own.py", "FILE.py:FUNCTION"),
        ("inspect --module own.txt:build", "FILE.py:FUNCTION"),
        ("quantize m --module own.py:build --output-dir d", "not both"),
        ("compare m --reference n --module own.py:build --output-dir d", "leave one of them out"),
        ("sample --output-dir d", "MODEL"),
        ("analyze m", "--reference"),
    ],
)
def test_usage(tfmq: Run, arguments: str, words: str) -> None:
    result = tfmq(*arguments.split())
    assert result.status == 2 and words in result.err and result.err.count("\n") == 1


def test_another_class_is_another_job(own: Path, recipe: Path, tmp_path: Path) -> None:
    """A job that goes on finds the conditions that it began with."""
    import torch

    import tfmq
    from tfmq.models.module_file import ModuleFile
    from tfmq.recipes.yaml import load
    from tfmq.storage.errors import JobMismatchError

    given = ModuleFile(own / "own.py", "build")
    tfmq.quantize(given, load(recipe), output_dir=tmp_path / "q")
    changed: Any = given.sampler()
    changed.per_image["kind"] = torch.tensor([0, 1, 1])
    with pytest.raises(JobMismatchError, match="sampler"):
        tfmq.quantize(changed, load(recipe), output_dir=tmp_path / "q", resume=True)
    assert json.loads((tmp_path / "q" / "tfmq_report.json").read_text())["fingerprint"]["sampler"][
        "per_image"
    ]["digest"]
