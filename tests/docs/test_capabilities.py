"""The page of capabilities says what the registers and the backends say today."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tfmq.backends.backend import BACKENDS
from tfmq.errors import MissingExtraError
from tfmq.recipes.presets import PRESETS

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "capabilities.py"


@pytest.fixture(scope="module")
def capabilities(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("docs/capabilities.py")


@pytest.fixture(scope="module")
def tables(capabilities: ModuleType) -> dict[str, str]:
    for name, backend in BACKENDS.items():
        try:
            missing = backend.missing()
        except MissingExtraError as error:
            pytest.skip(str(error))
        # `cuda` computes by definitions where there is no GPU.
        if missing and name != "cuda":
            pytest.skip(f"the page is made with every backend, and {name} needs {missing}")
    found: dict[str, str] = capabilities.tables()
    return found


def test_the_page_is_up_to_date(
    capabilities: ModuleType, tables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capabilities, "tables", lambda: tables)
    text = capabilities.PAGE.read_text(encoding="utf-8")
    assert capabilities.page(text) == text, (
        "docs/capabilities.md is out of date: run `python3 tasks.py matrix`"
    )


def test_everything_registered_is_on_the_page(tables: dict[str, str]) -> None:
    assert all(f"`{name}`" in text for name in BACKENDS for text in tables.values() if text)
    assert all(f"`{name}`" in tables["schemes"] for name in PRESETS)


def test_the_exact_reference_takes_every_layer_with_a_quantized_input(capabilities: ModuleType) -> None:
    column = list(BACKENDS).index("reference")
    rows = capabilities.layer_rows(
        [capabilities.Grids(capabilities.IntegerFormat(8), capabilities.IntegerFormat(8), "static")]
    )
    assert len(rows) > 8 and {cells[column] for cells in rows.values()} == {"integers"}


def test_a_page_without_a_part_is_refused(capabilities: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capabilities, "tables", lambda: {"layers": ""})
    with pytest.raises(ValueError, match="no part layers"):
        capabilities.page("# Capabilities")
