"""The report as one HTML file that needs nothing else: styles, script, plotting library, figures and images
are inside.
"""

import base64
import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfmq.errors import require
from tfmq.report.charts import charts
from tfmq.report.model import ModelReport
from tfmq.report.speed import BUSY
from tfmq.report.wall import build_wall
from tfmq.storage.atomic import atomic_write

PAGE = Path(__file__).parent / "page"
# Bytes that the page may take. Images are made smaller until it fits.
LIMIT = 5_000_000
UNIT = re.compile(r"(?<=\d) (?=(dB|[kMG]?B)\b)")


def _plotting_library() -> str:
    """Return plotly's script, compressed: as it is, it would take the whole size that a report may have."""
    source: Callable[[], str] = require("plotly.offline", extra="report").get_plotlyjs
    return base64.b64encode(gzip.compress(source().encode(), compresslevel=9, mtime=0)).decode()


def whole(text: str) -> str:
    r"""Return text in which no line breaks between a number and its unit.

    >>> whole("30 dB mean of 3 images")
    '30\xa0dB mean of 3 images'
    """
    return UNIT.sub("\N{NO-BREAK SPACE}", text)


def render(report: ModelReport) -> str:
    """Return the page.

    Raises:
        ForeignFileError: the pairs of images are damaged.
        MissingExtraError: jinja2, plotly or Pillow is not installed.
    """
    jinja = require("jinja2", extra="report")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(PAGE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["whole"] = whole
    figures = charts(report.analysis) if report.analysis is not None else ()
    values: dict[str, Any] = {
        "report": report,
        "busy": BUSY,
        "charts": figures,
        "library": _plotting_library() if figures else "",
        "style": (PAGE / "style.css").read_text(encoding="utf-8"),
        "script": (PAGE / "script.js").read_text(encoding="utf-8"),
    }
    template = environment.get_template("report.html.j2")
    used = len(template.render(**values, wall=None).encode())
    wall = build_wall(report.images, budget=LIMIT - used - 100_000) if report.images is not None else None
    page: str = template.render(**values, wall=wall)
    return page


def write_html(path: Path, report: ModelReport) -> None:
    """Write the page atomically; see `render`."""
    text = render(report).encode()
    with atomic_write(path, needed_bytes=len(text)) as temporary:
        temporary.write_bytes(text)
