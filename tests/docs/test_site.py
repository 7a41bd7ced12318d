"""The site has every page, and shows links and formulas as docs/site.py says."""

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAV = re.findall(r"- (\w+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def site(script: Callable[[str], ModuleType]) -> ModuleType:
    for name in ("mkdocs", "griffe", "latex2mathml"):
        pytest.importorskip(name)
    return script("docs/site.py")


def test_the_navigation_has_every_page_once() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} | {
        "contributing.md",
        "changelog.md",
        "security.md",
    }
    assert len(NAV) == len(set(NAV)) and set(NAV) == pages


def test_the_site_is_ignored() -> None:
    assert "/site/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()


def test_every_module_is_in_the_reference_once(site: ModuleType) -> None:
    modules = [name for names in site.packages().values() for name in names]
    assert len(modules) == len(set(modules)) and {"tfmq", "tfmq.api", "tfmq.numerics.affine"} <= set(modules)
    page, _, name = site.page_of(ROOT / "src" / "tfmq" / "numerics" / "affine.py").partition("#")
    assert name in site.packages()[page]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("[`api.py`](../src/tfmq/api.py) `quantize`", "[`api.py`](reference/tfmq.md#tfmq.api) `quantize`"),
        (
            "[a](format.md#errors), [b](../benchmarks/results), [c](https://example.org)",
            "[a](format.md#errors), b, [c](https://example.org)",
        ),
        ("[d](../CONTRIBUTING.md)", "[d](contributing.md)"),
    ],
)
def test_links(site: ModuleType, text: str, shown: str) -> None:
    assert site.LINK.sub(lambda link: site._linked(link, ROOT / "docs"), text) == shown


def test_formulas_and_fences(site: ModuleType) -> None:
    text = (
        "$`a_i`$ and $b$ cost `$5` or $6\n\n```python test small\nx = "
        "'$y$'\n```\n\n```math\nc * d\n```\n\n```sh\necho $HOME $PATH\n```"
    )
    shown = site.TOKEN.sub(site._shown, text)
    assert shown.count("<math") == 3 and "`$5` or $6" in shown and "echo $HOME $PATH" in shown
    assert (
        "```python\nx = '$y$'" in shown
        and "c * d" not in shown
        and "&#42;" not in shown.partition("```python")[0]
    )
