"""Pictures of an analysis that are lines over timesteps or bars over units."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tfmq.errors import require

BLUE, RED, GREY = "#3b6ea5", "#c0392b", "#e6e6e6"
# Number of layers whose ranges are drawn, the widest ranges first.
DRAWN, NAMED = 12, 40


@contextmanager
def drawing(path: Path, *, title: str, size: tuple[float, float] = (8, 4.6)) -> Iterator[tuple[Any, Any]]:
    """Yield a figure and its axes; save them at the end.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = require("matplotlib.figure", extra="report").Figure(
        figsize=size, dpi=110, facecolor="white", layout="constrained"
    )
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    yield figure, axes
    figure.savefig(path, metadata={"Software": None})


def widest(bounds: Mapping[str, Any]) -> list[str]:
    """Return the names of the layers whose ranges are drawn."""
    width = {name: max(bounds["high"][name]) - min(bounds["low"][name]) for name in bounds["high"]}
    return sorted(width, key=lambda name: -width[name])[:DRAWN]


def write_ranges(path: Path, ranges: Mapping[str, Any], *, title: str) -> None:
    """Draw the range of the temporal layers' outputs, the widest ones, one band each, over the timesteps."""
    bounds = ranges["outputs"]
    names = widest(bounds)
    with drawing(path, title=title) as (_, axes):
        for name in names:
            axes.fill_between(
                ranges["timesteps"],
                bounds["low"][name],
                bounds["high"][name],
                color=BLUE,
                alpha=0.06,
                linewidth=0,
            )
            for bound in bounds.values():
                axes.plot(ranges["timesteps"], bound[name], color=BLUE, alpha=0.6, linewidth=0.9)
        axes.set_xlabel("timestep")
        axes.set_ylabel("least and greatest output")
        axes.set_title(
            f"outputs of temporal layers, the {len(names)} widest of {len(bounds['high'])}",
            fontsize=11,
            loc="left",
        )
        axes.grid(True, color=GREY, linewidth=0.7)


def _by_call(axes: Any, timesteps: Sequence[float]) -> None:
    """Name lines, and label calls with a few of their timesteps."""
    ticks = np.unique(np.linspace(0, len(timesteps) - 1, min(8, len(timesteps))).round().astype(int))
    axes.set_xticks(ticks, [f"{timesteps[index]:g}" for index in ticks])
    axes.set_xlabel("timestep, from noise to image")
    axes.grid(True, color=GREY, linewidth=0.7)
    axes.legend(frameon=False, fontsize=9)


def write_trajectory(path: Path, trajectory: Mapping[str, Any], *, title: str) -> None:
    """Draw how far the state is from full precision at each call: the mean over images, and the image that
    strays most.
    """
    with drawing(path, title=title) as (_, axes):
        axes.plot(trajectory["worst"], color=BLUE, linewidth=1, label="image that strays most")
        axes.plot(trajectory["mean"], color=RED, linewidth=2.2, label="mean")
        axes.set_ylabel("relative error of the state")
        axes.set_title("deviation from the full-precision trajectory", fontsize=11, loc="left")
        _by_call(axes, trajectory["timesteps"])


def write_accumulation(path: Path, found: Mapping[str, Any], *, title: str) -> None:
    """Draw how errors of single predictions add up: what the steps so far move the final state by, beside
    what it is moved by.
    """
    with drawing(path, title=title) as (_, axes):
        axes.plot(found["predicted"], color=RED, linewidth=2.2, label="sum of errors, by their influence")
        axes.plot(found["random"], color=BLUE, linewidth=1, label="if they had nothing in common")
        axes.axhline(
            found["measured"], color="black", linewidth=1, linestyle="--", label="final state, as drawn"
        )
        axes.set_ylabel("relative error of the final state")
        axes.set_title("how errors of predictions add up", fontsize=11, loc="left")
        _by_call(axes, found["timesteps"])


def write_sensitivity(path: Path, found: Mapping[str, Any], *, title: str) -> None:
    """Draw the mean output error with one unit quantized, for the units that matter most."""
    means = np.array(found["error"]).mean(axis=1) if found["error"] else np.zeros(0)
    order = np.argsort(-means)[:NAMED]
    with drawing(path, title=title, size=(8, max(3.0, 1.4 + 0.2 * len(order)))) as (_, axes):
        axes.barh(range(len(order)), means[order], color=BLUE)
        axes.set_yticks(range(len(order)), [found["parts"][index]["name"] for index in order], fontsize=7)
        axes.invert_yaxis()
        axes.axvline(float(np.mean(found["whole"])), color=RED, linewidth=1.5, label="everything quantized")
        axes.set_xlabel("relative error of the output")
        axes.set_title("one unit quantized, the rest in full precision", fontsize=11, loc="left")
        axes.legend(frameon=False, fontsize=9)
