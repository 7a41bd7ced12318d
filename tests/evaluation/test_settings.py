"""What an evaluation may be asked for, and what its tools need."""

from pathlib import Path

import pytest

from tfmq.evaluation.settings import Settings, metric_names, prepare
from tfmq.evaluation.weights import WeightFolder
from tfmq.storage.errors import MissingFileError


def test_metrics_are_told_apart() -> None:
    every = Settings(num_images=1, steps=1, metrics=metric_names(), judge="scenes")
    assert every.of_sets == ("fid", "sfid", "is", "kid", "precision-recall") and every.of_pairs == (
        "psnr",
        "ssim",
        "lpips",
    )
    assert every.draws_sets and every.draws_pairs
    text = Settings(num_images=1, steps=1, metrics=("clip",))
    assert text.draws_sets and not text.draws_pairs and not text.of_sets
    assert Settings(num_images=1, steps=1, metrics=("trajectory",)).draws_pairs


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"metrics": ("fid", "fud")}, "fud; choose some of fid"),
        ({"metrics": ()}, "choose some of"),
        ({"extractor": "vgg"}, "'vgg'; choose one of inception, "),
        ({"num_images": 0}, "num_images"),
        ({"num_pairs": 0}, "num_pairs"),
    ],
)
def test_what_is_refused(change: dict[str, object], cause: str) -> None:
    with pytest.raises(ValueError, match=cause):
        Settings(**{"num_images": 1, "steps": 1, **change})  # type: ignore[arg-type]


def test_tools_are_what_the_metrics_need(tmp_path: Path) -> None:
    local = Settings(num_images=1, steps=1, metrics=("fid", "psnr"), extractor="pooled-pixels")
    tools = prepare(local, WeightFolder(tmp_path))
    assert tools.extractor is not None and tools.pairs.keys() == {"psnr"} and tools.clip is None
    assert tools.describe()["extractor"]["name"] == "pooled-pixels"
    pairs = prepare(Settings(num_images=1, steps=1, metrics=("psnr",)), WeightFolder(tmp_path))
    assert pairs.extractor is None


def test_what_is_missing_is_known_first(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="inception"):
        prepare(Settings(num_images=1, steps=1), WeightFolder(tmp_path))
    with pytest.raises(
        ValueError, match="is needs logits features, and the extractor pooled-pixels gives pool, spatial"
    ):
        prepare(
            Settings(num_images=1, steps=1, metrics=("is",), extractor="pooled-pixels"),
            WeightFolder(tmp_path),
        )
