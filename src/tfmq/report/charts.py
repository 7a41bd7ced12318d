"""The interactive figures of a report, as plotly figures made of an analysis."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfmq.errors import require
from tfmq.report.curves import widest
from tfmq.storage.errors import ForeignFileError

# Colours that can be read on light and on dark ground.
BLUE, RED, GREY = "#4a86c5", "#d9534f", "#8a8f98"
# Least relative error that is drawn, about the resolution of float32. A logarithmic axis has no zero.
FLOOR = 1e-7
# Most characters of a bar's label.
LABEL = 32


@dataclass(frozen=True)
class Chart:
    """A figure: its name in the page, its title, what it shows in a sentence, and plotly's JSON."""

    name: str
    title: str
    text: str
    json: str


def _layout(x: str, y: str, **more: Any) -> dict[str, Any]:
    axes = {
        "xaxis": {"title": {"text": x}, "automargin": True, **more.pop("xaxis", {})},
        "yaxis": {"title": {"text": y}, **more.pop("yaxis", {})},
    }
    return {
        **axes,
        "margin": {"l": 70, "r": 20, "t": 20, "b": 50},
        "height": 380,
        "showlegend": False,
        "hovermode": "closest",
        **more,
    }


def _lines(
    x: list[float], series: Mapping[str, list[float]], *, floor: float | None = None
) -> list[dict[str, Any]]:
    """Return one thin line a name, and the mean of all."""
    clipped = {
        name: [max(value, floor) if floor else value for value in values] for name, values in series.items()
    }
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": values,
            "name": name,
            "line": {"color": BLUE, "width": 1},
            "opacity": 0.45,
        }
        for name, values in clipped.items()
    ]
    if clipped:
        mean = [sum(values) / len(values) for values in zip(*clipped.values(), strict=True)]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": x,
                "y": mean,
                "name": "mean",
                "line": {"color": RED, "width": 3},
            }
        )
    return traces


def _disturbance(
    found: Mapping[str, Any],
) -> list[tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]]:
    steps, count = found["timesteps"], len(found["relative_error"])
    labels = [f"{step:g}" for step in steps]
    table = [[value / max(1, count) for value in row] for row in found["mismatch"]]
    heat = {
        "type": "heatmap",
        "x": labels,
        "y": labels,
        "z": table,
        "colorscale": "Viridis",
        "zmin": 0,
        "zmax": 1,
        "name": "share of features",
    }
    return [
        (
            "error",
            "Temporal features: error by timestep",
            (
                f"Relative error of each of {count} temporal features at each "
                "timestep, one line each, and their mean."
            ),
            _lines(steps, found["relative_error"], floor=FLOOR),
            _layout("timestep", "relative error", yaxis={"type": "log"}),
        ),
        (
            "cosine",
            "Temporal features: cosine by timestep",
            "Cosine between each quantized temporal feature and the full-precision one at the same timestep.",
            _lines(steps, found["cosine"]),
            _layout("timestep", "cosine"),
        ),
        (
            "mismatch",
            "Temporal information mismatch",
            "Share of the features at timestep t that are nearest to the "
            f"full-precision feature at t'; {found['mismatches']} of "
            f"{count * len(steps)} are off the diagonal.",
            [heat],
            _layout(
                "timestep t' of the nearest feature",
                "timestep t",
                xaxis={"type": "category"},
                yaxis={"type": "category"},
            ),
        ),
    ]


def _ranges(found: Mapping[str, Any]) -> tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]:
    bounds, names = found["outputs"], widest(found["outputs"])
    traces = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": found["timesteps"],
            "y": bounds[bound][name],
            "name": f"{name}, {word}",
            "line": {"width": 1.2},
        }
        for name in names
        for bound, word in (("low", "least"), ("high", "greatest"))
    ]
    text = (
        "Least and greatest output at each timestep, in full precision, of "
        f"the {len(names)} temporal layers with the widest range."
    )
    return "ranges", "Ranges of temporal layers", text, traces, _layout("timestep", "output")


def _by_call(
    found: Mapping[str, Any], series: Mapping[str, tuple[str, str, float]], vertical: str
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return traces over the calls of a trajectory, and their layout; `series` has for each key the name, the
    colour and the width of its line.
    """
    steps = found["timesteps"]
    common = {"type": "scatter", "mode": "lines+markers", "x": list(range(len(steps))), "customdata": steps}
    shown = {"hovertemplate": "call %{x}, t = %{customdata}: %{y:.3g}"}
    traces = [
        {**common, **shown, "y": found[key], "name": name, "line": {"color": colour, "width": width}}
        for key, (name, colour, width) in series.items()
    ]
    above = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    return traces, _layout(
        "call", vertical, xaxis={"dtick": max(1, len(steps) // 10)}, showlegend=True, legend=above
    )


def _trajectory(found: Mapping[str, Any]) -> tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]:
    series = {"worst": ("image that strays most", BLUE, 1.5), "mean": ("mean", RED, 3)}
    text = (
        "Relative error of the state at each denoiser call, from noise to image, "
        "from the same noise: mean over images and the worst image."
    )
    return (
        "trajectory",
        "Deviation from the full-precision trajectory",
        text,
        *_by_call(found, series, "relative error"),
    )


def _accumulation(found: Mapping[str, Any]) -> tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]:
    series = {
        "predicted": ("sum of errors, by their influence", RED, 3),
        "random": ("if they had nothing in common", BLUE, 1.5),
    }
    text = (
        "What errors of single predictions, on states of full precision, move the final "
        "state by: the steps so far, each by the influence that the "
        "sampler gives it, as far as the model does not answer. As drawn, "
        f"the final state is off by {found['measured']:.3g}."
    )
    return (
        "errors",
        "How errors of predictions add up",
        text,
        *_by_call(found, series, "relative error of the final state"),
    )


def _ending(name: str) -> str:
    """Return a name that leaves room for bars on a narrow page: the end of a long one, which tells it from
    its neighbours.
    """
    return name if len(name) <= LABEL else f"…{name[1 - LABEL :]}"


def _sensitivity(found: Mapping[str, Any]) -> tuple[str, str, str, list[dict[str, Any]], dict[str, Any]]:
    means = sorted(
        (
            (sum(row) / len(row), part["name"])
            for row, part in zip(found["error"], found["parts"], strict=True)
        )
    )
    whole = sum(found["whole"]) / len(found["whole"])
    names = [name for _, name in means]
    bars = {
        "type": "bar",
        "orientation": "h",
        "x": [mean for mean, _ in means],
        "y": names,
        "marker": {"color": BLUE},
    }
    labels = {"tickmode": "array", "tickvals": names, "ticktext": [_ending(name) for name in names]}
    layout = _layout(
        "relative error of the output",
        "",
        height=max(260, 90 + 20 * len(means)),
        yaxis={"automargin": True, **labels},
    )
    text = (
        "Error of the output with one unit quantized and the rest in full "
        f"precision; with everything quantized it is {whole:.3g}."
    )
    return "sensitivity", "Sensitivity of units", text, [bars], layout


def charts(analysis: Mapping[str, Any]) -> tuple[Chart, ...]:
    """Return the figures of an analysis.

    Raises:
        ForeignFileError: the analysis lacks something.
        MissingExtraError: plotly is not installed.
    """
    go = require("plotly.graph_objects", extra="report")
    try:
        drawn = [*_disturbance(analysis["disturbance"]), _ranges(analysis["ranges"])]
        added = [] if analysis["accumulation"] is None else [_accumulation(analysis["accumulation"])]
        drawn += [_trajectory(analysis["trajectory"]), *added, _sensitivity(analysis["sensitivity"])]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ForeignFileError(
            f"the analysis cannot be drawn ({error!r}); it is of another "
            "version of tfmq, or damaged: analyze again"
        ) from error
    # The empty template leaves colours of ground and text to the page, which has a light and a dark one.
    return tuple(
        Chart(name, title, text, go.Figure(traces, {**layout, "template": "none"}).to_json())
        for name, title, text, traces, layout in drawn
    )
