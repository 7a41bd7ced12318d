"""An analysis as Parquet: one table of one value a row, which any data frame reads and groups."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from tfmq.errors import require
from tfmq.storage.atomic import atomic_write

# A row: part, quantity, name (of a layer, a feature or a unit), timestep, value.
Row = tuple[str, str, str | None, float | None, float]
COLUMNS = ("part", "quantity", "name", "timestep", "value")


def _by_timestep(
    part: str, quantity: str, timesteps: Sequence[float], series: Mapping[str, Sequence[float]]
) -> Iterator[Row]:
    for name, values in series.items():
        for timestep, value in zip(timesteps, values, strict=True):
            yield part, quantity, name, timestep, float(value)


def _of_whole(part: str, quantity: str, timesteps: Sequence[float], values: Sequence[float]) -> Iterator[Row]:
    """Yield values that belong to no name."""
    for timestep, value in zip(timesteps, values, strict=True):
        yield part, quantity, None, timestep, value


def _disturbance(found: Mapping[str, Any]) -> Iterator[Row]:
    steps = found["timesteps"]
    for quantity in ("relative_error", "cosine"):
        yield from _by_timestep("disturbance", quantity, steps, found[quantity])
    nearest = {name: [steps[index] for index in indices] for name, indices in found["nearest"].items()}
    yield from _by_timestep("disturbance", "nearest_timestep", steps, nearest)


def _ranges(found: Mapping[str, Any]) -> Iterator[Row]:
    for place, bound in product(("input", "output"), ("low", "high")):
        yield from _by_timestep("ranges", f"{place}_{bound}", found["timesteps"], found[f"{place}s"][bound])


def _trajectory(found: Mapping[str, Any]) -> Iterator[Row]:
    for quantity in ("mean", "worst"):
        yield from _of_whole("trajectory", quantity, found["timesteps"], found[quantity])
    for quantity, value in (found["latent_error"] or {}).items():
        yield "trajectory", f"latent_{quantity}", None, None, value


def _sensitivity(found: Mapping[str, Any]) -> Iterator[Row]:
    series = {part["name"]: error for part, error in zip(found["parts"], found["error"], strict=True)}
    yield from _by_timestep("sensitivity", "relative_error", found["timesteps"], series)
    yield from _of_whole("sensitivity", "relative_error", found["timesteps"], found["whole"])


def _accumulation(found: Mapping[str, Any] | None) -> Iterator[Row]:
    if found is None:
        return
    for quantity in ("influence", "error", "bias", "gain", "correlation", "predicted", "random"):
        steps = _of_whole("accumulation", quantity, found["timesteps"], found[quantity])
        yield from (row for row in steps if row[-1] is not None)
    yield "accumulation", "measured", None, None, found["measured"]


def _layers(found: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    for layer, quantity in product(found, ("error", "full_ms", "quantized_ms", "zeros")):
        if layer[quantity] is not None:
            yield "layers", quantity, layer["name"], None, layer[quantity]


# The parts of an analysis, in the order of their rows.
_PARTS: dict[str, Callable[[Any], Iterator[Row]]] = {
    "disturbance": _disturbance,
    "ranges": _ranges,
    "trajectory": _trajectory,
    "sensitivity": _sensitivity,
    "accumulation": _accumulation,
    "layers": _layers,
}


def rows(values: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the values of an analysis, as `analysis.json` has them, one a row.

    `disturbance`: `relative_error`, `cosine` and `nearest_timestep` by feature and timestep. `ranges`:
    `input_low`, `input_high`, `output_low`, `output_high` by layer and timestep. `trajectory`: `mean` and
    `worst` by call, without a name; `latent_mean` and `latent_worst`, without a timestep. `accumulation`: the
    fields of `Accumulation` by step, and `measured`. `sensitivity`: `relative_error` by unit and timestep, of
    everything without a name. `layers`: `error`, `full_ms`, `quantized_ms`, `zeros`.
    """
    for part, of_part in _PARTS.items():
        yield from of_part(values[part])


def write_parquet(path: Path, values: Mapping[str, Any]) -> None:
    """Write the rows of an analysis atomically, its settings as JSON in the file's metadata under `tfmq`.

    Raises:
        MissingExtraError: pyarrow is not installed.
    """
    arrow, parquet = require("pyarrow", extra="parquet"), require("pyarrow.parquet", extra="parquet")
    columns = zip(*rows(values), strict=True)
    words = arrow.dictionary(arrow.int32(), arrow.string())
    types = {
        "part": words,
        "quantity": words,
        "name": words,
        "timestep": arrow.float64(),
        "value": arrow.float64(),
    }
    schema = arrow.schema(types, metadata={"tfmq": json.dumps(values["settings"], sort_keys=True)})
    arrays = [
        arrow.array(column, arrow.string()).dictionary_encode()
        if types[name] is words
        else arrow.array(column, types[name])
        for name, column in zip(COLUMNS, columns, strict=True)
    ]
    with atomic_write(path) as temporary:
        parquet.write_table(arrow.Table.from_arrays(arrays, schema=schema), temporary)
