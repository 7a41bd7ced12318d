"""`tfmq evaluate`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torchmetrics")
Run = Callable[..., Any]
LOCAL = ("--extractor", "pooled-pixels", "--num-images", 5, "--batch-size", 2, "--backend", "simulated")


class Whole(NamedTuple):
    """The arguments of an evaluation in one go, where it is, and what it printed."""

    command: tuple[object, ...]
    directory: Path
    json: Any


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, model: Path, quantized: Path, printed: Callable[..., Any]
) -> Whole:
    directory = tmp_path_factory.mktemp("whole") / "e"
    numbers = ("--num-pairs", 3, "--seed", 2)
    command = ("evaluate", quantized, "--reference", model, *numbers, *LOCAL)
    return Whole(command, directory, printed(*command, "--output-dir", directory))


def test_values_files_and_table(tfmq: Run, whole: Whole) -> None:
    assert [(row["metric"], row["model"], row["against"]) for row in whole.json["rows"]] == [
        ("fd[pooled-pixels]", "quantized", "full precision"),
        ("kid[pooled-pixels]", "quantized", "full precision"),
    ]
    paired = whole.json["paired"]
    assert (
        paired["count"] == 3
        and paired["metrics"].keys() == {"psnr", "ssim"}
        and len(paired["trajectory"]["mean"]) == 4
    )
    assert (
        whole.json["protocol"]["settings"]["steps"] == 4
        and whole.json["protocol"]["quantized"]["backend"] == "simulated"
    )
    assert sorted(path.name for path in whole.directory.parent.iterdir()) == ["e"]
    assert sorted(path.name for path in whole.directory.iterdir()) == ["evaluation.json", "pairs.npz"]
    stored = json.loads((whole.directory / "evaluation.json").read_text())
    assert {"output_dir": str(whole.directory), **stored} == whole.json
    shown = tfmq(*whole.command, "--output-dir", whole.directory)
    assert (
        shown.status == 0
        and "fd[pooled-pixels]" in shown.out
        and "3 pairs" in shown.out
        # A long path is wrapped.
        and "evaluation.json" in "".join(shown.out.split())
    )
    assert {line.partition(":")[0] for line in shown.err.splitlines()} == {
        "full precision",
        "quantized",
        "pairs",
    }


def test_pairs_are_those_of_compare(
    tfmq: Run, compared: Any, model: Path, quantized: Path, tmp_path: Path
) -> None:
    numbers = ("--num-images", 2, "--batch-size", 2, "--seed", 2, "--backend", "simulated")
    evaluated = tfmq(
        "evaluate",
        quantized,
        "--reference",
        model,
        *numbers,
        "--metrics",
        "psnr,ssim",
        "--output-dir",
        tmp_path / "e",
        "--json",
    ).json["paired"]["metrics"]
    assert evaluated["psnr"]["mean"] == pytest.approx(compared.json["psnr_db"]["mean"])
    assert evaluated["ssim"]["mean"] == pytest.approx(compared.json["ssim"])
    with np.load(compared.directory / "samples.npz") as a, np.load(tmp_path / "e" / "pairs.npz") as b:
        assert np.array_equal(a["reference"], b["reference"]) and np.array_equal(
            a["quantized"], b["quantized"]
        )


def test_shards_then_the_whole(tfmq: Run, whole: Whole, tmp_path: Path) -> None:
    command = (*whole.command, "--json")
    for shard in ("0/2", "1/2"):
        part = tfmq(*command, "--output-dir", tmp_path / "e", "--shard", shard)
        assert part.status == 0 and part.json == {"output_dir": str(tmp_path / "e"), "shard": shard}
        assert not (tmp_path / "e").exists()
    together = tfmq(*command, "--output-dir", tmp_path / "e", "--resume").json
    assert together["rows"] == whole.json["rows"] and together["paired"] == whole.json["paired"]
    assert not (tmp_path / "e.job").exists()
    # A shard of another evaluation leaves the values that are there.
    assert tfmq(*command, "--output-dir", tmp_path / "e", "--seed", 1, "--shard", "0/2").status == 0
    assert (tmp_path / "e" / "evaluation.json").exists()


def test_real_images_and_the_recipes_figures(tfmq: Run, model: Path, recipe: Path, tmp_path: Path) -> None:
    figure = "{metric: fid, value: 3.0, tolerance: 0.1, num_images: 50000, steps: 100, source: a paper}"
    (tmp_path / "r.yaml").write_text(
        recipe.read_text() + f"rounding: {{solver: nearest}}\npublished: [{figure}]\n"
    )
    assert (
        tfmq("quantize", model, "--recipe", tmp_path / "r.yaml", "--output-dir", tmp_path / "q").status == 0
    )
    np.savez(
        tmp_path / "real.npz", images=np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    )
    command = (
        "evaluate",
        tmp_path / "q",
        "--reference",
        model,
        "--real",
        tmp_path / "real.npz",
        "--metrics",
        "fid",
        *LOCAL,
    )
    result = tfmq(*command, "--json")
    assert [(row["model"], row["against"]) for row in result.json["rows"]] == [
        ("full precision", "real"),
        ("quantized", "real"),
        ("quantized", "full precision"),
    ]
    (record,) = result.json["baseline"]
    assert record["value"] == 3.0 and "pooled-pixels" in record["not_compared"]
    shown = tfmq(*command)
    assert "published fid" in shown.out and "not compared" in shown.out


def test_without_weights_it_says_what_to_do(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    inception = "weights-inception", "--extractor pooled-pixels"
    # All that this model has: it draws from no text, so that there is no clip score to refuse.
    for metrics, words in (("fid", inception), ("all", inception), ("lpips", ("alexnet", "psnr,ssim"))):
        where = ("--weights-dir", tmp_path / "w", "--output-dir", tmp_path / "e")
        result = tfmq("evaluate", quantized, "--reference", model, "--metrics", metrics, *where)
        assert result.status == 1 and result.out == "" and result.err.count("\n") == 1
        assert all(word in result.err for word in (*words, str(tmp_path / "w" / "checkpoints")))
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused(tfmq: Run, model: Path, quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "r.npz").write_text("no archive")
    np.savez(tmp_path / "s.npz", mu=np.zeros(192), sigma=np.eye(192))
    out = ("--output-dir", tmp_path / "e", *LOCAL)
    for arguments, cause in (
        ((model, "--reference", model), "holds no model quantized"),
        ((quantized, "--reference", quantized), "quantized itself"),
        ((quantized,), "--reference MODEL"),
        ((quantized, "--real", tmp_path / "nowhere"), "nowhere does not exist"),
        ((quantized, "--real", tmp_path / "r.npz"), "r.npz"),
        (
            (quantized, "--real", tmp_path / "s.npz", "--metrics", "fid,kid"),
            "kid needs real images; the statistics in s.npz",
        ),
        ((quantized, "--real", tmp_path / "s.npz", "--metrics", "sfid"), "sfid needs real images"),
    ):
        result = tfmq("evaluate", *arguments, *out)
        assert result.status == 1 and cause in result.err and result.err.count("\n") == 1, (cause, result)
    (tmp_path / "notes.txt").write_text("mine")
    result = tfmq("evaluate", quantized, "--reference", model, *LOCAL, "--output-dir", tmp_path)
    assert result.status == 1 and "notes.txt" in result.err and result.err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "r.npz", "s.npz"]


def test_another_evaluations_work_is_not_gone_on_with(
    tfmq: Run, model: Path, quantized: Path, tmp_path: Path
) -> None:
    command = ("evaluate", quantized, "--reference", model, "--output-dir", tmp_path / "e", *LOCAL)
    assert tfmq(*command, "--shard", "0/2").status == 0
    result = tfmq(*command, "--seed", 1, "--resume")
    assert result.status == 1 and "settings.seed was 0 and is 1" in result.err
