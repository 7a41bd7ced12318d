"""What `tfmq bench` measured, with the machine that it was measured on."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tfmq.evaluation.cost.system import machine_in_words
from tfmq.report.directory import read_result
from tfmq.storage.errors import ForeignFileError

BUSY = "Other processes kept the processors busy: the least loaded rounds are shown."
_FIELDS = ("machine", "weights", "rows")
_NUMBERS = ("batch", "ms_per_step", "speedup", "peak_rss_bytes")


@dataclass(frozen=True)
class Speed:
    """The cost of a denoising step.

    Args:
        machine: that it was measured on, in words.
        weights: sha256 of the quantized model's tensors.
        clean: whether no other process disturbed what the rows show.
        rows: one a backend and batch size, as `tfmq bench` names their fields.
    """

    machine: str
    weights: str
    clean: bool
    rows: tuple[Mapping[str, Any], ...]


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and {"backend", "clean"} <= row.keys()
        and all(isinstance(row.get(key), int | float) for key in _NUMBERS)
    )


def read_speed(path: Path) -> Speed:
    """Return what `tfmq bench --json` printed into a file.

    Raises:
        MissingFileError, TruncatedFileError: it is not there, or empty.
        ForeignFileError: it is something else, or does not say what was measured and where.
    """
    values = read_result(path, _FIELDS, verb="bench --json")
    rows = values["rows"]
    if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
        raise ForeignFileError(f"{path} holds no rows of a benchmark; pass what tfmq bench --json printed")
    try:
        machine = machine_in_words(values["machine"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ForeignFileError(
            f"{path} does not describe the machine ({error!r}); pass what tfmq bench --json printed"
        ) from error
    return Speed(machine, str(values["weights"]), all(row["clean"] for row in rows), tuple(rows))
