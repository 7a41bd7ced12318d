"""The model card: the numbers of the report as Markdown, with the metadata that the hub reads."""

from collections.abc import Sequence
from pathlib import Path

from tfmq.report.metrics import MetricRow
from tfmq.report.model import ModelReport
from tfmq.report.speed import BUSY, Speed
from tfmq.storage.atomic import atomic_write


def _cell(text: object) -> str:
    """Return text that cannot leave its table cell."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _table(heading: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines] + [""]


def _metadata(report: ModelReport) -> list[str]:
    base = (
        [f'base_model: "{report.base_model}"', "base_model_relation: quantized"] if report.base_model else []
    )
    return [
        "---",
        f"library_name: {'tfmq' if report.bare else 'diffusers'}",
        *base,
        "tags:",
        "- tfmq",
        "- quantized",
        "---",
        "",
    ]


USE = """\
```python
import tfmq  # lets diffusers open the packed weights, and run them by what is fastest on this machine
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PLACE")
```
"""


USE_MODULE = """\
```python
import tfmq
IMPORT
tfmq.load("PLACE", module=sampler.denoiser.module)  # in place; computes in integers where this machine can
images = sampler.run(range(4), steps=STEPS, seed=0)
```
"""


def _use(report: ModelReport, place: str) -> str:
    """Return the Python that draws with the model."""
    if not report.bare:
        return USE.replace("PLACE", place)
    steps = dict(report.recipe).get("calibration.steps", "50")
    source = "sampler = ...  # a tfmq.LoopSampler around the architecture"
    if report.module is not None:
        name = report.module.function
        source = f"from {report.module.path.stem} import {name}\n\nsampler = {name}()"
    return USE_MODULE.replace("IMPORT", source).replace("PLACE", place).replace("STEPS", steps)


def _metrics(rows: Sequence[MetricRow]) -> list[str]:
    """Return the table of metrics of sets; with full precision where that was evaluated."""
    if any(row.full for row in rows):
        return _table(
            ("metric", "full precision", "quantized"), [(row.name, row.full, row.quantized) for row in rows]
        )
    return _table(("metric", "quantized"), [(row.name, row.quantized) for row in rows])


def _speed(speed: Speed) -> list[str]:
    """Return what was measured on which machine, and the table of it."""
    rows: list[tuple[object, ...]] = [
        (
            row["backend"],
            row["batch"],
            f"{row['ms_per_step']:.1f}",
            f"{row['speedup']:.2f}x",
            f"{row['peak_rss_bytes'] / 1e6:.0f}",
        )
        for row in speed.rows
    ]
    heading = "backend", "batch", "ms a step", "against eager float32", "peak MB"
    return [f"Measured on {speed.machine}.{'' if speed.clean else f' {BUSY}'}", "", *_table(heading, rows)]


def render_card(report: ModelReport, *, place: str | None = None) -> str:
    """Return the card; `place` is the hub id that it is for."""
    origin = f" from {report.base_model}" if report.base_model else ""
    lines = [
        *_metadata(report),
        f"# {report.name}",
        "",
        f"Quantized by tfmq{origin}, scheme {report.scheme}.",
        "",
    ]
    lines += [_use(report, place or report.name)]
    lines += _table(("", ""), list(report.facts))
    if report.metrics:
        lines += ["## Images as sets", "", *_metrics(report.metrics)]
    if report.pairs:
        lines += ["## Pairs from the same noise", "", *_table(("metric", "value"), list(report.pairs))]
    if report.published:
        lines += ["## Published figures", "", *_table(("figure", "value"), list(report.published))]
    if report.speed:
        lines += ["## Speed", "", *_speed(report.speed)]
    if not report.evaluation:
        lines += ["Not evaluated.", ""]
    return "\n".join(lines)


def write_card(path: Path, report: ModelReport, *, place: str | None = None) -> None:
    """Write the card for the hub id `place` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_card(report, place=place), encoding="utf-8")
