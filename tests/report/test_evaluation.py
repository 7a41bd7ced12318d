"""What an evaluation leaves on disk."""

from pathlib import Path

import numpy as np
import pytest

from tfmq.evaluation.deviation import Trajectory
from tfmq.evaluation.result import Evaluation, Paired, Row, Spread
from tfmq.report.evaluation import evaluation_values, read_evaluation, write_evaluation
from tfmq.storage.errors import CheckpointError


def made(*, pairs: bool = True) -> Evaluation:
    images = np.zeros((2, 4, 4, 3), dtype=np.uint8)
    paired = Paired(
        5,
        {"psnr": Spread(30.0, 20.0, 40.0)},
        Trajectory((9.0, 1.0), (0.0, 0.1), (0.0, 0.2)),
        images,
        images + 1,
    )
    return Evaluation(
        (Row("fid", "quantized", "real", 4.5, None),),
        paired if pairs else None,
        ({"metric": "fid", "measured": 4.0},),
    )


@pytest.mark.parametrize("pairs", [True, False])
def test_values_and_files(tmp_path: Path, pairs: bool) -> None:
    values = evaluation_values(made(pairs=pairs), {"settings": {"seed": 1}})
    write_evaluation(tmp_path, made(pairs=pairs), values)
    assert (
        read_evaluation(tmp_path) == values
        and values["rows"][0]["value"] == 4.5
        and values["protocol"] == {"settings": {"seed": 1}}
    )
    assert (tmp_path / "pairs.npz").exists() == pairs
    if pairs:
        assert (
            values["paired"]["trajectory"]["latent_error"] is None
            and values["paired"]["metrics"]["psnr"]["min"] == 20
        )
        with np.load(tmp_path / "pairs.npz") as stored:
            assert stored["quantized"].max() == 1 and stored["reference"].max() == 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"rows": []}'])
def test_what_is_no_evaluation(tmp_path: Path, content: str) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"evaluation\.json"):
        read_evaluation(tmp_path)
