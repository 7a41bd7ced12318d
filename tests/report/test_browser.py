"""The report in a real browser: it draws, slides, sorts, follows light and dark, and complains of nothing."""

import os
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tfmq.report.html import write_html

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("plotly")
CHROMIUM = (
    os.environ.get("TFMQ_CHROMIUM")
    or shutil.which("chromium")
    or shutil.which("chromium-browser")
    or shutil.which("google-chrome")
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium on the path; install the package chromium, or name one by TFMQ_CHROMIUM",
)
# The plotting library is large, and machines that test are slow.
PATIENCE = 120_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--headless", "--no-sandbox", "--disable-gpu"], timeout=PATIENCE
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, write_model: Any, gathered: Any, bench_file: Any, tmp_path: Path) -> Iterator[Any]:
    """Open a report from disk, offline; whatever the browser complains of fails the test."""
    layers = ("mid.a", "mid.b", "mid.c", "mid.d", "down_blocks.1.attentions.0.to_q", "mid.f", "out")
    write_html(tmp_path / "report.html", gathered(write_model(layers=layers), bench=bench_file()))
    context = browser.new_context(offline=True, color_scheme="light", viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    complaints: list[str] = []
    opened.on(
        "console",
        lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None,
    )
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:", "blob:")) else complaints.append(request.url)
        ),
    )
    opened.goto((tmp_path / "report.html").as_uri(), timeout=PATIENCE)
    opened.wait_for_selector("html[data-drawn=yes]", state="attached", timeout=PATIENCE)
    yield opened
    context.close()
    assert complaints == []


def test_the_page(page: Any, tmp_path: Path) -> None:
    """One page load for all, because it takes seconds."""
    assert page.title() == "model: w4a8"
    charts = page.locator(".chart")
    assert charts.count() == 6
    for number in range(6):
        assert (
            charts.nth(number).locator("svg.main-svg").count() > 0
            and charts.nth(number).bounding_box()["height"] > 100
        )
    check_slider(page)
    check_sorting(page)
    check_names(page)
    check_colours(page)
    for width in (800, 400):
        check_width(page, width)
    page.screenshot(path=tmp_path / "narrow.png")
    assert (tmp_path / "narrow.png").stat().st_size > 1000


BROKEN = """() => [...document.querySelectorAll('td.number, thead th, .facts th, tbody th, caption')].flatMap(cell => {
    const walker = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT), words = [];
    while (walker.nextNode()) for (const word of walker.currentNode.data.matchAll(/[^\\s.,-]+|-?[\\d.]+/g)) {
        const range = document.createRange();
        range.setStart(walker.currentNode, word.index);
        range.setEnd(walker.currentNode, word.index + word[0].length);
        if (new Set([...range.getClientRects()].filter(box => box.width).map(box => Math.round(box.top))).size > 1) words.push(word[0]);
    }
    return words;
})"""
HIDDEN = """() => [...document.querySelectorAll('.chart')].flatMap(chart => {
    const room = chart.getBoundingClientRect(), title = chart.querySelector('.xtitle').getBoundingClientRect();
    const outside = box => box.left < room.left - 1 || box.right > room.right + 1 || box.top < room.top - 1 || box.bottom > room.bottom + 1;
    const cut = [...chart.querySelectorAll('text')].filter(text => text.textContent && outside(text.getBoundingClientRect()));
    const under = [...chart.querySelectorAll('.xtick text')].filter(text => text.getBoundingClientRect().bottom > title.top + 1);
    return [...cut, ...under].map(text => `${chart.id}: ${text.textContent}`);
})"""
CAPTIONS = (
    "[...document.querySelectorAll('caption span')].map(caption => caption.getBoundingClientRect().right)"
)


def check_width(page: Any, width: int) -> None:
    """Nothing but a table scrolls, no number or word is broken, no label is cut or covered."""
    page.set_viewport_size({"width": width, "height": 800})
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true; })")
    # Figures are drawn anew for the width a moment later.
    page.wait_for_function(
        f"document.documentElement.scrollWidth <= {width} && !({HIDDEN})().length", timeout=PATIENCE
    )
    assert page.evaluate(BROKEN) == [] and max(page.evaluate(CAPTIONS)) <= width
    table = page.get_by_role("region", name="Table of layers")
    table.evaluate("region => { region.scrollLeft = region.scrollWidth; }")
    name = table.locator("tbody th").first.bounding_box()
    assert table.bounding_box()["x"] <= name["x"] < name["x"] + name["width"] < width / 2


def check_slider(page: Any) -> None:
    """By keyboard and by value, the line moves in every image."""
    slider, before = page.get_by_role("slider"), page.locator(".wall .before")
    assert before.count() == 2

    def shown() -> list[str]:
        return before.evaluate_all("images => images.map(image => getComputedStyle(image).clipPath)")

    middle = shown()
    slider.focus()
    page.keyboard.press("Home")
    start = shown()
    page.keyboard.press("End")
    end = shown()
    assert len({middle[0], start[0], end[0]}) == 3 and len(set(start)) == len(set(end)) == 1
    assert page.evaluate("document.getElementById('wall').style.getPropertyValue('--divide')") == "100%"


def check_sorting(page: Any) -> None:
    """Numbers sort as numbers, names as names, and what was not measured stays last."""
    table = page.locator("table.sortable").first

    def column(number: int) -> list[str]:
        return table.locator(f"tbody tr > :nth-child({number})").all_inner_texts()

    names = column(1)
    table.get_by_role("button", name="weight bits").click()
    assert column(2) == ["4"] * 6 + ["8"]
    table.get_by_role("button", name="weight bits").click()
    assert column(2) == ["8"] + ["4"] * 6
    assert table.locator("th[aria-sort=descending]").inner_text().startswith("weight bits")
    for expected in (["0.05", "0.1"], ["0.1", "0.05"]):
        table.get_by_role("button", name="relative error").click()
        assert column(5)[:2] == expected and set(column(5)[2:]) == {""}
    table.get_by_role("button", name="layer").click()
    assert column(1) == sorted(names)


def check_names(page: Any) -> None:
    """Whatever can be used or looked at has a name."""
    unnamed = page.evaluate("""() => [...document.querySelectorAll('button, input, img, [role=img], [role=region], section')].filter(element => {
        const labels = (element.getAttribute('aria-labelledby') || '').split(' ').filter(Boolean).map(id => document.getElementById(id)?.textContent);
        const name = element.getAttribute('aria-label') || labels.join('') || element.getAttribute('alt') || element.textContent;
        return !name || !name.trim();
    }).map(element => element.outerHTML.slice(0, 80))""")
    assert unnamed == []
    levels = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3')].map(heading => Number(heading.tagName[1]))"
    )
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def check_colours(page: Any) -> None:
    """Light and dark are other grounds, text stands out on both, and figures follow."""
    contrast = """() => {
        const of = (name) => getComputedStyle(document.body)[name].match(/[0-9.]+/g).slice(0, 3).map(Number);
        const light = (rgb) => rgb.map(v => v / 255).map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const [a, b] = [light(of('color')), light(of('backgroundColor'))].sort((x, y) => y - x);
        return [(a + 0.05) / (b + 0.05), light(of('backgroundColor'))];
    }"""
    text = "() => getComputedStyle(document.querySelector('.chart text.xtitle')).fill"
    (light, ground), light_text = page.evaluate(contrast), page.evaluate(text)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(
        "before => getComputedStyle(document.querySelector('.chart text.xtitle')).fill !== before",
        arg=light_text,
        timeout=PATIENCE,
    )
    dark, dark_ground = page.evaluate(contrast)
    assert min(light, dark) > 7 and ground > 0.9 and dark_ground < 0.1
