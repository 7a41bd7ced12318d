"""An analysis as plain values, and the files that keep and show it."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tfmq.evaluation.analysis.analyze import Analysis
from tfmq.report.curves import write_accumulation, write_ranges, write_sensitivity, write_trajectory
from tfmq.report.directory import read_result
from tfmq.report.mismatch import write_mismatch
from tfmq.report.temporal import write_temporal
from tfmq.storage.atomic import write_json
from tfmq.temporal.disturbance import Disturbance

ANALYSIS_FILE = "analysis.json"
PARQUET_FILE = "analysis.parquet"
ANALYSIS_FILES = (
    ANALYSIS_FILE,
    PARQUET_FILE,
    "temporal.png",
    "mismatch.png",
    "ranges.png",
    "trajectory.png",
    "sensitivity.png",
    "errors.png",
)
_FIELDS = ("disturbance", "ranges", "trajectory", "sensitivity", "layers", "accumulation", "settings")


def _lists(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    return {name: tensor.cpu().tolist() for name, tensor in tensors.items()}


def mismatch_map(disturbed: Disturbance) -> Tensor:
    """Return `[S, S]`: how many quantized features at timestep `t` (row) are nearest to the full-precision
    feature at `t'` (column).
    """
    count = len(disturbed.timesteps)
    table = torch.zeros(count, count, dtype=torch.long)
    for index in disturbed.nearest.values():
        table[torch.arange(count), index.cpu()] += 1
    return table


def analysis_values(analysis: Analysis, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return an analysis as values that JSON keeps; `settings` are what it was made with."""
    disturbed, ranges, found = analysis.disturbance, analysis.ranges, analysis.sensitivity
    return {
        "settings": dict(settings),
        "disturbance": {
            "timesteps": disturbed.timesteps.tolist(),
            "relative_error": _lists(disturbed.relative_error),
            "cosine": _lists(disturbed.cosine),
            "nearest": _lists(disturbed.nearest),
            "mismatch": mismatch_map(disturbed).tolist(),
            "mismatches": disturbed.mismatches,
        },
        "ranges": {
            "timesteps": ranges.timesteps.tolist(),
            "inputs": {"low": _lists(ranges.inputs.low), "high": _lists(ranges.inputs.high)},
            "outputs": {"low": _lists(ranges.outputs.low), "high": _lists(ranges.outputs.high)},
        },
        "trajectory": analysis.trajectory.values(),
        "sensitivity": {
            "timesteps": found.timesteps.tolist(),
            "parts": [{"name": part.name, "layers": list(part.layers)} for part in found.parts],
            "error": found.error.tolist(),
            "whole": found.whole.tolist(),
        },
        "layers": [asdict(layer) for layer in analysis.layers],
        "accumulation": None if analysis.accumulation is None else analysis.accumulation.values(),
    }


def write_analysis(directory: Path, analysis: Analysis, values: Mapping[str, Any], *, title: str) -> None:
    """Write `analysis.json` and a picture of each part."""
    write_temporal(directory / "temporal.png", analysis.disturbance, title=title)
    write_mismatch(directory / "mismatch.png", values["disturbance"], title=title)
    write_ranges(directory / "ranges.png", values["ranges"], title=title)
    write_trajectory(directory / "trajectory.png", values["trajectory"], title=title)
    write_sensitivity(directory / "sensitivity.png", values["sensitivity"], title=title)
    if values["accumulation"] is not None:
        write_accumulation(directory / "errors.png", values["accumulation"], title=title)
    write_json(directory / ANALYSIS_FILE, values)


def read_analysis(directory: Path) -> dict[str, Any]:
    """Return what `tfmq analyze` wrote to `directory`.

    Raises:
        MissingFileError, TruncatedFileError: it is not there, or empty.
        ForeignFileError: it is something else.
    """
    return read_result(directory / ANALYSIS_FILE, _FIELDS, verb="analyze")
