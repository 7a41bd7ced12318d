"""An analysis as Parquet: one table of one value a row, which any data frame reads and groups."""

import json
from collections.abc import Iterator, Mapping, Sequence
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


def rows(values: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the values of an analysis, as `analysis.json` has them, one a row.

    `disturbance`: `relative_error`, `cosine` and `nearest_timestep` by feature and timestep. `ranges`:
    `input_low`, `input_high`, `output_low`, `output_high` by layer and timestep. `trajectory`: `mean` and
    `worst` by call, without a name; `latent_mean` and `latent_worst`, without a timestep. `accumulation`: the
    fields of `Accumulation` by step, and `measured`. `sensitivity`: `relative_error` by unit and timestep, of
    everything without a name. `layers`: `error`, `full_ms`, `quantized_ms`.
    """
    found = values["disturbance"]
    steps = found["timesteps"]
    for quantity in ("relative_error", "cosine"):
        yield from _by_timestep("disturbance", quantity, steps, found[quantity])
    nearest = {name: [steps[index] for index in indices] for name, indices in found["nearest"].items()}
    yield from _by_timestep("disturbance", "nearest_timestep", steps, nearest)
    found = values["ranges"]
    for place in ("input", "output"):
        for bound in ("low", "high"):
            yield from _by_timestep(
                "ranges", f"{place}_{bound}", found["timesteps"], found[f"{place}s"][bound]
            )
    found = values["trajectory"]
    for quantity in ("mean", "worst"):
        yield from (
            ("trajectory", quantity, None, step, value)
            for step, value in zip(found["timesteps"], found[quantity], strict=True)
        )
    for quantity, value in (found["latent_error"] or {}).items():
        yield "trajectory", f"latent_{quantity}", None, None, value
    found = values["sensitivity"]
    series = {part["name"]: error for part, error in zip(found["parts"], found["error"], strict=True)}
    yield from _by_timestep("sensitivity", "relative_error", found["timesteps"], series)
    yield from (
        ("sensitivity", "relative_error", None, step, value)
        for step, value in zip(found["timesteps"], found["whole"], strict=True)
    )
    if (added := values["accumulation"]) is not None:
        for quantity in ("influence", "error", "bias", "gain", "correlation", "predicted", "random"):
            pairs = zip(added["timesteps"], added[quantity], strict=True)
            yield from (
                ("accumulation", quantity, None, step, value) for step, value in pairs if value is not None
            )
        yield "accumulation", "measured", None, None, added["measured"]
    for layer in values["layers"]:
        yield from (
            ("layers", quantity, layer["name"], None, layer[quantity])
            for quantity in ("error", "full_ms", "quantized_ms")
        )


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
