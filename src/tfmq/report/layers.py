"""The quantized layers of a model, as rows of a report."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfmq.nn.structure import EMBEDDING, input_kind, named_specs

INPUTS = {
    "full": "input in full precision",
    "static": "input static",
    "per_step": "input per timestep",
    "dynamic": "input dynamic by token",
}


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer. What was not measured is None."""

    name: str
    weight_bits: int
    activation_bits: int | None
    scheme: str
    error: float | None
    full_ms: float | None
    quantized_ms: float | None
    zeros: float | None


def _scheme(spec: Mapping[str, Any]) -> str:
    """Return how a layer is quantized, in words."""
    grid = spec.get("grid") or ("symmetric" if spec["symmetric"] else "asymmetric")
    if spec.get("kind") == EMBEDDING:
        return f"rows {grid}"
    inputs = INPUTS[input_kind(spec["input"])]
    split = f", split in {len(spec['segments'])}" if spec["segments"] else ""
    return f"weight {grid}, {inputs}{split}"


def layer_rows(structure: Mapping[str, Any], analysis: Mapping[str, Any] | None) -> tuple[LayerRow, ...]:
    """Return a row for each layer of a structure, with what an analysis measured of it."""
    measured = {layer["name"]: layer for layer in (analysis or {"layers": ()})["layers"]}
    rows = []
    for name, spec in named_specs(structure, "layers"):
        found = measured.get(name, {})
        activation = spec["input"]["bits"] if spec["input"] else None
        rows.append(
            LayerRow(
                name,
                spec["bits"],
                activation,
                _scheme(spec),
                *(found.get(key) for key in ("error", "full_ms", "quantized_ms", "zeros")),
            )
        )
    return tuple(rows)
