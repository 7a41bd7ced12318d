"""The cost of a calibration, measured on a model that a test can pay for."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def test_cells_say_what_a_job_held_and_took(
    solvers: ModuleType,
    models: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import calibration

    monkeypatch.setattr(calibration, "known_models", lambda *_: models)
    monkeypatch.setattr(calibration, "CELLS", (calibration.Cell("tiny", None), calibration.Cell("tiny", 256)))
    for cell in calibration.CELLS:
        result = calibration.measure(cell, None)
        assert result["parameters"] > 1000 and result["before_mib"] > 50 and result["held_mib"] >= 0
        assert (
            result["cpu_seconds"] >= sum(result["stages"].values()) > 0 and min(result["stages"].values()) > 0
        )
        (tmp_path / f"{cell.name}.json").write_text(json.dumps(result))
    calibration.write_results(tmp_path)
    free, limited = (tmp_path / "calibration.md").read_text().splitlines()[2:]
    assert free.endswith("|  |") and limited.endswith("| yes |") and "256 MiB" in limited
    assert "tiny" in capsys.readouterr().out
