"""The page as text: whole, small, and nobody else's."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tfmq.report.card import render_card
from tfmq.report.charts import charts
from tfmq.report.html import LIMIT, render, write_html
from tfmq.storage.errors import ForeignFileError

pytest.importorskip("plotly")
pytest.importorskip("jinja2")


class Page(HTMLParser):
    """Collects the attributes of every element, and the text outside scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def test_the_page_needs_no_network(write_model: Any, gathered: Any) -> None:
    page = Page(render(gathered(write_model())))
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
    assert {tag for tag, _ in page.elements} >= {"main", "h1", "h2", "table", "figure", "img", "input"}


def test_the_numbers_are_those_of_the_card(write_model: Any, gathered: Any) -> None:
    found = gathered(write_model())
    text = Page(render(found)).text.replace("\N{NO-BREAK SPACE}", " ")
    card = render_card(found).replace("\\", "")
    values = {value for row in found.metrics for value in (row.name, row.full, row.quantized)} | {
        text for row in (*found.facts, *found.pairs) for text in row
    }
    for value in values - {""}:
        assert value in text and value in card
    assert "Not evaluated" not in text


def test_speed_is_that_of_the_card(write_model: Any, gathered: Any, bench_file: Any) -> None:
    found = gathered(write_model(), bench=bench_file(of_row={"clean": False}))
    text = Page(render(found)).text
    assert found.speed.machine in text and "kept the processors busy" in text and "Not measured" not in text
    for value in ("1234.2", "2.50", "1250"):
        assert value in text and value in render_card(found)


def test_without_evaluation_and_analysis_there_is_a_page_too(write_model: Any, gathered: Any) -> None:
    text = render(gathered(write_model(), evaluation=None, analysis=None))
    assert 'id="library"' not in text and len(text) < 50_000
    for verb in ("evaluate", "analyze", "bench --json"):
        assert f"<code>tfmq {verb}</code>" in text


def test_64_samples_stay_below_the_limit(write_model: Any, gathered: Any, tmp_path: Path) -> None:
    """Noise is what compresses worst."""
    images = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
    write_html(tmp_path / "r.html", gathered(write_model(images=images)))
    size = (tmp_path / "r.html").stat().st_size
    assert size < LIMIT == 5_000_000
    assert (tmp_path / "r.html").read_text().count("data:image/") == 128


def test_names_are_text_and_not_markup(write_model: Any, gathered: Any) -> None:
    hostile = "<img src=x onerror=alert(1)></script>"
    page = Page(render(gathered(write_model(layers=(hostile, "out"), scheme=hostile))))
    assert hostile in page.text and not any("onerror" in attributes for _, attributes in page.elements)


def test_equal_reports_are_equal_bytes(write_model: Any, gathered: Any) -> None:
    found = gathered(write_model())
    assert render(found) == render(found)


def test_charts_hold_the_analysis(write_model: Any, gathered: Any) -> None:
    analysis = gathered(write_model()).analysis
    made = {chart.name: json.loads(chart.json) for chart in charts(analysis)}
    assert made.keys() == {"error", "cosine", "mismatch", "ranges", "trajectory", "errors", "sensitivity"}
    first = next(iter(analysis["disturbance"]["relative_error"]))
    assert made["error"]["data"][0]["y"] == pytest.approx(analysis["disturbance"]["relative_error"][first])
    assert made["trajectory"]["data"][1]["y"] == analysis["trajectory"]["mean"]
    assert made["sensitivity"]["data"][0]["x"] == pytest.approx([0.15, 0.2]) and made["sensitivity"]["data"][
        0
    ]["y"] == ["out", "mid"]
    assert np.array(made["mismatch"]["data"][0]["z"]).sum(axis=1) == pytest.approx(1)


def test_bars_have_the_ends_of_long_names(write_model: Any, gathered: Any) -> None:
    analysis = gathered(write_model()).analysis
    long = [f"transformer_blocks.{number}.attentions.0.transformer_blocks.{number}" for number in range(2)]
    for part, name in zip(analysis["sensitivity"]["parts"], long, strict=True):
        part["name"] = name
    made = next(json.loads(chart.json) for chart in charts(analysis) if chart.name == "sensitivity")
    labels = made["layout"]["yaxis"]["ticktext"]
    assert made["data"][0]["y"] == made["layout"]["yaxis"]["tickvals"] == long[::-1]
    assert [label[0] for label in labels] == ["…", "…"] and all(
        name.endswith(label[1:]) for name, label in zip(long[::-1], labels, strict=True)
    )


@pytest.mark.parametrize("part", ["disturbance", "ranges", "trajectory", "accumulation", "sensitivity"])
def test_a_damaged_analysis_is_refused(write_model: Any, gathered: Any, part: str) -> None:
    found = gathered(write_model())
    with pytest.raises(ForeignFileError, match="cannot be drawn"):
        charts({**found.analysis, part: {}})


def test_every_chart_says_what_it_shows(write_model: Any, gathered: Any) -> None:
    text = render(gathered(write_model()))
    described: list[str] = re.findall(
        r'class="chart" id="chart-\w+" role="img" aria-labelledby="([\w-]+)"', text
    )
    assert len(described) == 7 and all(f'id="{name}"' in text for name in described)
