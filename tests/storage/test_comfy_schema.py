"""The published schema of a layer's description says what the writer writes and the reader reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tfmq.storage.comfy import METADATA, Int8Layer, encoded, split_layers
from tfmq.storage.errors import CheckpointError

jsonschema = pytest.importorskip("jsonschema")
SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "comfy.schema.json").read_text(encoding="utf-8"))
ROWS, WIDTH = 3, 64


def valid(found: Any, part: str = "layer") -> bool:
    schema = SCHEMA | {"$ref": f"#/$defs/{part}"}
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(found))


def reads(metadata: Any) -> bool:
    """Return whether the reader takes a file with the layer `a` and these descriptions."""
    float8 = "float8" in json.dumps(metadata)
    weight = torch.ones(ROWS, WIDTH).to(torch.float8_e4m3fn if float8 else torch.int8)
    tensors = {"a.weight": weight, "a.weight_scale": torch.ones(ROWS, 1)}
    try:
        split_layers(tensors, {METADATA: json.dumps(metadata)}, source="a file")
    except CheckpointError:
        return False
    return True


@pytest.mark.parametrize("rotated", [0, 4, 64])
@pytest.mark.parametrize("full", [False, True])
def test_what_is_written_follows_the_schema(rotated: int, full: bool) -> None:
    codes = torch.ones(ROWS, WIDTH, dtype=torch.int8)
    written = encoded(Int8Layer(codes, torch.ones(ROWS, 1), rotated, full))[".comfy_quant"]
    assert valid(json.loads(bytes(written.tolist())))


INT8 = {"format": "int8_tensorwise"}
DESCRIPTIONS: list[Any] = [
    INT8,
    INT8 | {"convrot": True, "convrot_groupsize": 16},
    INT8 | {"params": {"convrot": True, "convrot_groupsize": 64}},
    INT8 | {"convrot": True, "convrot_groupsize": 8},
    INT8 | {"convrot": True, "convrot_groupsize": "64"},
    INT8 | {"convrot": 1},
    INT8 | {"params": {"convrot": "yes"}},
    INT8 | {"full_precision_matrix_mult": 0},
    INT8 | {"note": [1, 2]},
    {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    {"format": "nvfp4"},
    {"format": None},
    {"convrot": True},
    "int8_tensorwise",
    "mxfp8",
    [INT8],
    3,
    None,
]


@pytest.mark.parametrize("described", DESCRIPTIONS, ids=repr)
def test_the_reader_takes_what_the_schema_takes(described: Any) -> None:
    metadata = {"layers": {"a": described}}
    assert reads(metadata) == valid(metadata, "metadata")


@pytest.mark.parametrize("metadata", [{}, {"layers": []}, [], {"layers": 3}], ids=repr)
def test_metadata_without_layers_is_refused_by_both(metadata: Any) -> None:
    assert not reads(metadata) and not valid(metadata, "metadata")
