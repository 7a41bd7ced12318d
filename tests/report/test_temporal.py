"""The figure of temporal disturbance."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tfmq.evaluation.comparison import Comparison
from tfmq.report.temporal import write_temporal

Make = Callable[..., Comparison]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return the list to which every figure goes when it is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        figures.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_lines_are_errors_and_cosines_and_their_means(
    tmp_path: Path, comparison: Make, drawn: list[Figure]
) -> None:
    temporal = comparison(features=3).temporal
    write_temporal(tmp_path / "t.png", temporal, title="t")
    left, middle, _ = drawn[0].axes
    assert left.get_yscale() == "log" and "cosine" in middle.get_title(loc="left")
    for axes, found in ((left, temporal.relative_error), (middle, temporal.cosine)):
        values = np.stack([value.numpy() for value in found.values()])
        lines = [line.get_ydata() for line in axes.lines if len(line.get_ydata())]
        np.testing.assert_allclose(lines, [*values, values.mean(axis=0)], rtol=1e-6)
        np.testing.assert_allclose(axes.lines[0].get_xdata(), temporal.timesteps)


def test_map_shows_how_many_steps_away_the_nearest_is(
    tmp_path: Path, comparison: Make, drawn: list[Figure]
) -> None:
    temporal = comparison(noise=5.0).temporal
    assert temporal.mismatches > 0
    write_temporal(tmp_path / "t.png", temporal, title="t")
    shown = drawn[0].axes[2].images[0].get_array()
    for row, index in zip(shown, temporal.nearest.values(), strict=True):
        assert row.tolist() == (index.numpy() - np.arange(5)).tolist()
    assert f"{temporal.mismatches} of 10" in drawn[0].axes[2].get_title(loc="left")


@pytest.mark.parametrize(
    "shape", [{"noise": 0.0}, {"steps": 1}, {"features": 0}, {"features": 40, "steps": 100}]
)
def test_odd_shapes_are_drawn(tmp_path: Path, comparison: Make, shape: dict[str, float]) -> None:
    write_temporal(tmp_path / "t.png", comparison(**shape).temporal, title="t")
    pixels = np.asarray(Image.open(tmp_path / "t.png").convert("L"))
    assert pixels.min() < 100 and pixels.shape[1] > pixels.shape[0] > 300
