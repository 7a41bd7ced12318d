"""The gate: what was published is reached, missed, or not comparable."""

from dataclasses import replace

import pytest

from tfmq.evaluation.baseline import BaselineError, check_baseline
from tfmq.evaluation.settings import Settings
from tfmq.recipes import Published

FIGURE = Published(metric="fid", value=4.12, tolerance=0.2, num_images=50_000, steps=400, source="table 1")
SETTINGS = Settings(num_images=50_000, steps=400)


def test_a_figure_that_is_reached_is_recorded() -> None:
    (record,) = check_baseline([FIGURE], {"fid": 4.25}, SETTINGS)
    assert record["measured"] == 4.25 and record["value"] == 4.12 and record["not_compared"] is None


@pytest.mark.parametrize("value", [3.9, 4.4])
def test_a_figure_that_is_missed_stops_and_names_causes(value: float) -> None:
    with pytest.raises(BaselineError) as error:
        check_baseline([FIGURE], {"fid": value}, SETTINGS)
    for word in (f"{value}", "4.12", "table 1", "scaling", "EMA", "sampler", "statistics"):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("settings", "measured", "reason"),
    [
        (replace(SETTINGS, num_images=1000), {"fid": 9.0}, "50000 images, not 1000"),
        (replace(SETTINGS, steps=50), {"fid": 9.0}, "400 steps, not 50"),
        (replace(SETTINGS, extractor="pooled-pixels"), {"fid": 9.0}, "pooled-pixels"),
        (SETTINGS, {"kid": 9.0}, "not measured"),
    ],
)
def test_what_is_not_comparable_is_recorded_with_the_reason(
    settings: Settings, measured: dict[str, float], reason: str
) -> None:
    (record,) = check_baseline([FIGURE], measured, settings)
    assert reason in record["not_compared"]


@pytest.mark.parametrize("change", [{"tolerance": 0.0}, {"num_images": 0}, {"steps": 0}])
def test_impossible_figures(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        replace(FIGURE, **change)  # type: ignore[arg-type]
