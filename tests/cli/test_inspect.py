"""`tfmq inspect`."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
KEYS = {
    "family",
    "parameters",
    "temporal",
    "units",
    "layers",
    "bytes",
    "predicted_bytes",
    "temporal_parameters",
    "table_bytes",
    "schemes",
    "speed",
}
KEYS |= {"inputs", "floating", "embeddings", "components"}


def test_full_precision(tfmq: Run, model: Path) -> None:
    result = tfmq("inspect", model, "--json")
    assert result.status == 0 and result.err == "" and result.json.keys() == KEYS
    found = result.json
    assert found["family"] == "UNet2DModel" and found["bytes"] == {
        "fp32": 4 * found["parameters"],
        "quantized": None,
    }
    unet = {"name": "unet", "kind": "UNet2DModel", "bytes": found["bytes"]["fp32"]}
    assert found["components"] == [{**unet, "networks": [], "layers": 0}]
    assert found["predicted_bytes"]["w4"] < found["predicted_bytes"]["w8"] < found["bytes"]["fp32"]
    for layer in found["temporal"]:
        assert (
            layer.keys() == {"name", "depends_on", "cacheable", "role"}
            and layer["depends_on"] == ["timestep"]
            and layer["cacheable"] is True
        )
    assert (
        {layer["weight_bits"] for layer in found["layers"]}
        == {None}
        == {layer["activation_bits"] for layer in found["layers"]}
    )
    assert all(unit.keys() == {"name", "layers"} and unit["layers"] for unit in found["units"])


def test_quantized(tfmq: Run, model: Path, quantized: Path) -> None:
    before, after = tfmq("inspect", model, "--json").json, tfmq("inspect", quantized, "--json").json
    for key in ("family", "parameters", "temporal", "units"):
        assert after[key] == before[key]
    assert [layer["name"] for layer in after["layers"]] == [layer["name"] for layer in before["layers"]]
    assert {(layer["weight_bits"], layer["activation_bits"]) for layer in after["layers"]} == {(4, 8)}
    on_disk = sum(path.stat().st_size for path in (quantized / "unet").iterdir())
    assert after["bytes"] == {"fp32": before["bytes"]["fp32"], "quantized": on_disk}


def test_one_screen(tfmq: Run, deeper_model: Path, quantized: Path) -> None:
    advice = "begin with w8a8 or, smaller, w4a8; w4a32, rules of 7"
    for source, words in (
        (deeper_model, ("full precision", "w4 about", advice, "8 of timestep (tabulated)")),
        (quantized, ("w4a8", "->", "5 of timestep (tabulated)")),
    ):
        out = tfmq("inspect", source).out
        assert len(out.splitlines()) <= 50
        for word in (
            "stays in float",
            "GroupNorm",
            "UNet2DModel",
            "for 20 steps",
            "time_embedding.linear_1",
            "mid_block.attentions.0",
            "more (--json lists all)",
            *words,
        ):
            assert word in out


@pytest.mark.parametrize(("height", "rows"), [(36, 4), (60, 12), (24, 1)])
def test_what_is_shown_fits_on_one_screen(
    tfmq: Run, monkeypatch: pytest.MonkeyPatch, height: int, rows: int
) -> None:
    for name, value in (
        ("FORCE_COLOR", "1"),
        ("NO_COLOR", "1"),
        ("TERM", "xterm"),
        ("LINES", str(height)),
        ("COLUMNS", "80"),
    ):
        monkeypatch.setenv(name, value)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", tfmq("inspect", "default").out).splitlines()
    # Each list: as many rows as fit, the count of the rest.
    for heading in ("temporal layer", "unit  "):
        (start,) = (number for number, line in enumerate(lines) if line.startswith(heading))
        assert lines[start + rows + 1].startswith("... and ")
    assert len(lines) < height or rows == 1


def test_folded_names_count_as_the_lines_that_they_take(tfmq: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("FORCE_COLOR", "1"),
        ("NO_COLOR", "1"),
        ("TERM", "xterm"),
        ("LINES", "40"),
        ("COLUMNS", "48"),
    ):
        monkeypatch.setenv(name, value)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", tfmq("inspect", "default").out).splitlines()
    assert 34 < len(lines) < 40
