"""The values and pictures of an analysis."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tfmq.evaluation.analysis.analyze import Analysis
from tfmq.report.analysis import (
    ANALYSIS_FILES,
    PARQUET_FILE,
    analysis_values,
    mismatch_map,
    read_analysis,
    write_analysis,
)
from tfmq.storage.errors import CheckpointError
from tfmq.temporal.disturbance import Disturbance


def test_mismatch_map_counts_features() -> None:
    nearest = {"a": torch.tensor([0, 1, 1]), "b": torch.tensor([0, 0, 2])}
    disturbed = Disturbance(torch.tensor([1.0, 2.0, 3.0]), {}, {}, nearest)
    assert mismatch_map(disturbed).tolist() == [[2, 0, 0], [1, 1, 0], [0, 1, 1]]


def test_values_and_files(tmp_path: Path, analysis: Callable[..., Analysis]) -> None:
    made = analysis()
    values = analysis_values(made, {"seed": 0})
    assert json.loads(json.dumps(values)) == values
    assert (
        values["disturbance"]["mismatches"] == made.disturbance.mismatches
        and values["trajectory"]["latent_error"] is None
    )
    np.testing.assert_allclose(values["sensitivity"]["error"], made.sensitivity.error)
    write_analysis(tmp_path, made, values, title="w4a8")
    assert {path.name for path in tmp_path.iterdir()} == {*ANALYSIS_FILES} - {PARQUET_FILE}
    assert read_analysis(tmp_path) == values
    for name in (name for name in ANALYSIS_FILES if name.endswith(".png")):
        assert np.asarray(Image.open(tmp_path / name).convert("L")).min() < 100, name


@pytest.mark.parametrize("shape", [{"steps": 1}, {"features": 0}, {"features": 40, "steps": 60}])
def test_odd_shapes_are_drawn(
    tmp_path: Path, analysis: Callable[..., Analysis], shape: dict[str, int]
) -> None:
    made = analysis(**shape)
    write_analysis(tmp_path, made, analysis_values(made, {}), title="t")
    assert (tmp_path / "mismatch.png").stat().st_size > 0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {}}'])
def test_what_is_no_analysis(tmp_path: Path, content: str) -> None:
    (tmp_path / "analysis.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"analysis\.json"):
        read_analysis(tmp_path)
