"""Values in words: the baseline beside the quantized model, units, and nothing where nothing was measured."""

from typing import Any

from tfmq.report.metrics import MetricRow, metric_rows, pair_rows, published_rows


def row(
    metric: str, model: str, against: str | None, value: float, deviation: float | None = None
) -> dict[str, Any]:
    return {"metric": metric, "model": model, "against": against, "value": value, "deviation": deviation}


def test_the_baseline_stands_beside_the_quantized_model() -> None:
    """Metrics keep the order they were asked for; of one metric, real images come first."""
    rows = [
        row("fid", "full precision", "real", 3.25),
        row("is", "full precision", None, 9.0, 0.5),
        row("fid", "quantized", "full precision", 0.75),
        row("fid", "quantized", "real", 3.5),
        row("is", "quantized", None, 8.75),
    ]
    assert metric_rows(rows) == (
        MetricRow("fid against real", "3.25", "3.5"),
        MetricRow("fid against full precision", "", "0.75"),
        MetricRow("is", "9 ± 0.5", "8.75"),
    )
    assert metric_rows([]) == ()


def test_adherence_is_in_percent_by_attribute() -> None:
    rows = [
        row(f"adherence.{name}", model, None, value, 0.0123)
        for name in ("identity", "place")
        for model, value in FOUND.items()
    ]
    assert metric_rows(rows) == tuple(
        MetricRow(f"adherence.{name}", "91.2 ± 1.2 %", "90.0 ± 1.2 %") for name in ("identity", "place")
    )


FOUND = {"full precision": 0.912, "quantized": 0.9}


def test_pairs_have_units() -> None:
    spread = {"mean": 0.9, "min": 0.5, "max": 1.0}
    trajectory = {"mean": [0.0, 0.2], "latent_error": None}
    assert pair_rows(
        {
            "count": 3,
            "metrics": {"psnr": {"mean": 30.0, "min": 20.0, "max": 40.0}, "ssim": spread},
            "trajectory": trajectory,
        }
    ) == (
        ("psnr, 3 pairs", "30 dB mean, 20 to 40 dB"),
        ("ssim, 3 pairs", "0.9 mean, 0.5 to 1"),
        ("trajectory", "relative error 0.2 at the last of 2 calls"),
    )
    assert pair_rows({"count": 3, "metrics": {}, "trajectory": None}) == () == pair_rows(None)


def test_a_published_figure_says_what_came_of_it() -> None:
    figure = {"metric": "fid", "value": 4.12, "source": "a paper"}
    rows = published_rows(
        [
            {**figure, "measured": 4.2, "not_compared": None},
            {**figure, "measured": None, "not_compared": "it is for 50000 images"},
        ]
    )
    assert rows == (
        ("published fid of full precision", "4.12 (a paper); measured 4.2"),
        ("published fid of full precision", "4.12 (a paper); not compared: it is for 50000 images"),
    )
