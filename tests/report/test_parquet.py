"""The Parquet file holds what the JSON file holds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tfmq.report.analysis import analysis_values
from tfmq.report.parquet import COLUMNS, rows, write_parquet

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def values(analysis: Callable[..., Any]) -> dict[str, Any]:
    return {**analysis_values(analysis(), {"seed": 7})}


def test_the_file_has_the_rows_and_the_settings(values: dict[str, Any], tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", values)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert tuple(table.column_names) == COLUMNS and json.loads(table.schema.metadata[b"tfmq"]) == {"seed": 7}
    assert [tuple(row[name] for name in COLUMNS) for row in table.to_pylist()] == list(rows(values))


def test_every_value_is_a_row(values: dict[str, Any]) -> None:
    found = list(rows(values))
    disturbed, ranges, moved = values["disturbance"], values["ranges"], values["sensitivity"]
    features, steps = len(disturbed["cosine"]), len(disturbed["timesteps"])
    counts = {
        part: sum(row[0] == part for row in found)
        for part in ("disturbance", "ranges", "trajectory", "accumulation", "sensitivity", "layers")
    }
    assert counts == {
        "disturbance": 3 * features * steps,
        "ranges": 4 * len(ranges["inputs"]["low"]) * steps,
        "trajectory": 2 * len(values["trajectory"]["mean"]),
        "accumulation": 7 * len(values["accumulation"]["timesteps"]),
        "sensitivity": (len(moved["parts"]) + 1) * len(moved["timesteps"]),
        "layers": 3 * len(values["layers"]),
    }
    assert len(set((row[:4]) for row in found)) == len(found)
    name, index = next(iter(disturbed["nearest"])), 2
    step = disturbed["timesteps"][index]
    expected = disturbed["timesteps"][disturbed["nearest"][name][index]]
    assert ("disturbance", "nearest_timestep", name, step, expected) in found
    assert ("sensitivity", "relative_error", "out", 1.0, pytest.approx(0.1)) in found


def test_what_images_are_decoded_from(values: dict[str, Any]) -> None:
    values["trajectory"]["latent_error"] = {"mean": 0.25, "worst": 0.5}
    found = list(rows(values))
    assert ("trajectory", "latent_mean", None, None, 0.25) in found and (
        "trajectory",
        "latent_worst",
        None,
        None,
        0.5,
    ) in found


def test_equal_analyses_are_equal_bytes(values: dict[str, Any], tmp_path: Path) -> None:
    for name in "ab":
        write_parquet(tmp_path / name, values)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
