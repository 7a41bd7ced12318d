"""The model card: the numbers of the report as Markdown, with the metadata that the hub reads."""

from pathlib import Path

from tfmq.report.model import ModelReport
from tfmq.storage.atomic import atomic_write


def _cell(text: object) -> str:
    """Return text that cannot leave its table cell."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def _table(heading: tuple[str, ...], rows: list[tuple[object, ...]]) -> list[str]:
    lines = [heading, tuple("---" for _ in heading), *rows]
    return [f"| {' | '.join(map(_cell, line))} |" for line in lines] + [""]


def _metadata(report: ModelReport) -> list[str]:
    base = [f'base_model: "{report.base_model}"', "base_model_relation: quantized"] if report.base_model else []
    return ["---", "library_name: diffusers", *base, "tags:", "- tfmq", "- quantized", "---", ""]


def render_card(report: ModelReport) -> str:
    """Return the card."""
    lines = [*_metadata(report), f"# {report.name}", "", f"Quantized by tfmq, scheme {report.scheme}.", ""]
    lines += _table(("", ""), list(report.facts))
    if report.metrics:
        lines += ["## Images as sets", ""]
        heading = ("metric", "full precision / real", "quantized / real", "quantized / full precision")
        lines += _table(heading, [(row.name, *row.values) for row in report.metrics])
    if report.pairs:
        lines += ["## Pairs from the same noise", "", *_table(("metric", "value"), list(report.pairs))]
    if report.speed:
        lines += ["## Speed", ""]
        speed = [(row["backend"], row["batch"], f"{row['ms_per_step']:.1f}", f"{row['speedup']:.2f}x") for row in report.speed]
        lines += _table(("backend", "batch", "ms a step", "against eager float32"), list(speed))
    if not report.evaluation:
        lines += ["Not evaluated.", ""]
    return "\n".join(lines)


def write_card(path: Path, report: ModelReport) -> None:
    """Write the card atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_card(report), encoding="utf-8")
