"""The results of an evaluation as plain values, and the files that keep them."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tfmq.evaluation.result import Evaluation
from tfmq.report.directory import read_result
from tfmq.storage.atomic import write_json

EVALUATION_FILE, PAIRS_FILE = "evaluation.json", "pairs.npz"
EVALUATION_FILES = (EVALUATION_FILE, PAIRS_FILE)
_FIELDS = ("protocol", "rows", "paired", "baseline")


def evaluation_values(evaluation: Evaluation, protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return an evaluation as values that JSON keeps; `protocol` is everything that it can be repeated by."""
    paired = evaluation.paired
    values = None
    if paired is not None:
        trajectory = None if paired.trajectory is None else paired.trajectory.values()
        metrics = {name: asdict(spread) for name, spread in paired.metrics.items()}
        values = {"count": paired.count, "metrics": metrics, "trajectory": trajectory}
    rows = [asdict(row) for row in evaluation.rows]
    return {
        "protocol": dict(protocol),
        "rows": rows,
        "paired": values,
        "baseline": [dict(record) for record in evaluation.baseline],
    }


def write_evaluation(directory: Path, evaluation: Evaluation, values: Mapping[str, Any]) -> None:
    """Write `evaluation.json`, and `pairs.npz` with the first pairs, arrays `reference` and `quantized`."""
    if evaluation.paired is not None:
        np.savez_compressed(
            directory / PAIRS_FILE,
            reference=evaluation.paired.reference,
            quantized=evaluation.paired.quantized,
        )
    write_json(directory / EVALUATION_FILE, values)


def read_evaluation(directory: Path) -> dict[str, Any]:
    """Return what `tfmq evaluate` wrote to `directory`.

    Raises:
        MissingFileError, TruncatedFileError: it is not there, or empty.
        ForeignFileError: it is something else.
    """
    return read_result(directory / EVALUATION_FILE, _FIELDS, verb="evaluate")
