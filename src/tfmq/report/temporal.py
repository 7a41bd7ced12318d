"""The figure of temporal disturbance: error and cosine at each timestep, and where a feature looks like
another timestep's.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tfmq.errors import require
from tfmq.temporal.disturbance import Disturbance

# Draw relative errors below float32's resolution at that resolution.
FLOOR = 1e-7
# Most features whose names are written beside the rows.
NAMED = 28


def _draw_lines(axes: Any, disturbed: Disturbance, found: Mapping[str, Tensor], *, floor: float) -> None:
    """Draw one thin line a feature, and the mean; nothing lies below `floor`."""
    timesteps = disturbed.timesteps.cpu().numpy()
    values = torch.stack([value.cpu().double() for value in found.values()]).numpy()
    marker = "o" if len(timesteps) < 3 else None
    for value in values:
        axes.plot(
            timesteps,
            np.maximum(value, floor),
            color="#3b6ea5",
            alpha=0.35,
            linewidth=0.8,
            marker=marker,
            markersize=3,
        )
    axes.plot(
        timesteps,
        np.maximum(values.mean(axis=0), floor),
        color="#c0392b",
        linewidth=2.2,
        label="mean",
        marker=marker,
    )
    axes.plot(
        [], [], color="#3b6ea5", alpha=0.6, linewidth=0.8, label=f"{len(values)} features, one line each"
    )
    axes.set_xlabel("timestep")
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.legend(frameon=False, fontsize=9, loc="best")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_errors(axes: Any, disturbed: Disturbance) -> None:
    """Draw the relative error of each feature."""
    _draw_lines(axes, disturbed, disturbed.relative_error, floor=FLOOR)
    axes.set_yscale("log")
    axes.set_ylabel("relative error")
    axes.set_title("disturbance of temporal features", fontsize=11, loc="left")


def _draw_cosines(axes: Any, disturbed: Disturbance) -> None:
    """Draw the cosine between each feature and the full-precision one."""
    _draw_lines(axes, disturbed, disturbed.cosine, floor=-1)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set_title("cosine to the full-precision feature", fontsize=11, loc="left")


def _draw_mismatches(figure: Any, axes: Any, disturbed: Disturbance) -> None:
    """Draw, for each feature and timestep, how many steps away the nearest full-precision feature is."""
    names = list(disturbed.nearest)
    own = torch.arange(len(disturbed.timesteps))
    shift = torch.stack([disturbed.nearest[name].cpu() - own for name in names]).numpy()
    reach = max(1, int(np.abs(shift).max()))
    image = axes.imshow(shift, cmap="RdBu_r", vmin=-reach, vmax=reach, aspect="auto", interpolation="nearest")
    ticks = np.unique(np.linspace(0, len(own) - 1, min(6, len(own))).round().astype(int))
    axes.set_xticks(ticks, [f"{float(disturbed.timesteps[index]):g}" for index in ticks])
    axes.set_xlabel("timestep")
    if len(names) <= NAMED:
        axes.set_yticks(range(len(names)), names, fontsize=6.5)
    else:
        axes.set_ylabel("feature")
    count = disturbed.mismatches
    found = "no mismatch" if count == 0 else f"{count} of {shift.size} mismatched"
    axes.set_title(f"nearest timestep of each feature: {found}", fontsize=11, loc="left")
    if count:
        figure.colorbar(image, ax=axes, label="steps away", pad=0.02)


def write_temporal(path: Path, disturbed: Disturbance, *, title: str) -> None:
    """Draw errors and cosines by timestep and the map of mismatches; a model without such features gives a
    figure that says so.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="report")
    figure = figures.Figure(figsize=(17, 4.6), dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    if disturbed.relative_error:
        left, middle, right = figure.subplots(1, 3)
        _draw_errors(left, disturbed)
        _draw_cosines(middle, disturbed)
        _draw_mismatches(figure, right, disturbed)
    else:
        figure.text(0.5, 0.45, "no temporal feature found", ha="center", fontsize=12, color="#666666")
    figure.savefig(path, metadata={"Software": None})
