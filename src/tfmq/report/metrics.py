"""The values of an evaluation in words: what the page, the card and the command line show alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tfmq.evaluation.adherence.judge import ADHERENCE
from tfmq.evaluation.deviation import in_words

# A metric is compared with real images first, stands alone second, and is compared with full precision last.
AGAINST = ("real", None, "full precision")
UNITS = {"psnr": " dB"}


@dataclass(frozen=True)
class MetricRow:
    """A metric of sets of images, with what it compares with in its name; empty for a model that it was not
    measured of.
    """

    name: str
    full: str
    quantized: str


def metric_rows(rows: Sequence[Mapping[str, Any]]) -> tuple[MetricRow, ...]:
    """Return the values of sets of images by metric and by what it compares with, the baseline beside the
    quantized model.
    """
    table: dict[tuple[str, str | None], dict[str, str]] = {}
    for row in rows:
        table.setdefault((row["metric"], row["against"]), {})[row["model"]] = _in_words(row)
    metrics = list(dict.fromkeys(metric for metric, _ in table))
    ordered = sorted(table.items(), key=lambda item: (metrics.index(item[0][0]), AGAINST.index(item[0][1])))
    return tuple(
        MetricRow(
            f"{metric} against {against}" if against else metric,
            values.get("full precision", ""),
            values.get("quantized", ""),
        )
        for (metric, against), values in ordered
    )


def _in_words(row: Mapping[str, Any]) -> str:
    """Return a value with its spread; shares of images in percent."""
    share = row["metric"].startswith(f"{ADHERENCE}.")
    value, deviation = (
        None if number is None else (100 * number if share else number)
        for number in (row["value"], row["deviation"])
    )
    text = f"{value:.1f}" if share else f"{value:.4g}"
    spread = "" if deviation is None else f" ± {deviation:.1f}" if share else f" ± {deviation:.2g}"
    return f"{text}{spread} %" if share else f"{text}{spread}"


def spread_in_words(metric: str, spread: Mapping[str, float]) -> str:
    """Return mean and extremes of a metric over pairs, with its unit.

    >>> spread_in_words("psnr", {"mean": 30.0, "min": 25.5, "max": 40.125})
    '30 dB mean, 25.5 to 40.12 dB'
    """
    unit = UNITS.get(metric, "")
    return f"{spread['mean']:.4g}{unit} mean, {spread['min']:.4g} to {spread['max']:.4g}{unit}"


def pair_rows(paired: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...]:
    """Return the metrics of pairs and of their trajectories, as names and texts."""
    if paired is None:
        return ()
    rows = [
        (f"{name}, {paired['count']} pairs", spread_in_words(name, spread))
        for name, spread in paired["metrics"].items()
    ]
    return (*rows, *(in_words(paired["trajectory"]) if paired["trajectory"] else ()))


def published_rows(baseline: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, str], ...]:
    """Return what was published of full precision beside what was measured, or why the two were not
    compared.
    """
    rows = []
    for figure in baseline:
        found = (
            f"not compared: {figure['not_compared']}"
            if figure["not_compared"]
            else f"measured {figure['measured']:.4g}"
        )
        rows.append(
            (
                f"published {figure['metric']} of full precision",
                f"{figure['value']:g} ({figure['source']}); {found}",
            )
        )
    return tuple(rows)
