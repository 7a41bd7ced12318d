"""The figure of temporal disturbance: how large it is at each timestep, and where a feature looks like another timestep's."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tfmq.errors import require
from tfmq.temporal.disturbance import Disturbance

# Relative errors below float32's resolution are drawn at its edge.
FLOOR = 1e-7
NAMED = 28


def _draw_errors(axes: Any, disturbed: Disturbance) -> None:
    """Draw one thin line a feature, and the mean."""
    timesteps = disturbed.timesteps.cpu().numpy()
    errors = torch.stack([error.cpu().double() for error in disturbed.relative_error.values()]).numpy()
    marker = "o" if len(timesteps) < 3 else None
    for error in errors:
        axes.plot(timesteps, np.maximum(error, FLOOR), color="#3b6ea5", alpha=0.35, linewidth=0.8, marker=marker, markersize=3)
    axes.plot(timesteps, np.maximum(errors.mean(axis=0), FLOOR), color="#c0392b", linewidth=2.2, label="mean", marker=marker)
    axes.plot([], [], color="#3b6ea5", alpha=0.6, linewidth=0.8, label=f"{len(errors)} features, one line each")
    axes.set_yscale("log")
    axes.set_xlabel("timestep")
    axes.set_ylabel("relative error")
    axes.set_title("disturbance of temporal features", fontsize=11, loc="left")
    axes.grid(True, which="major", color="#e6e6e6", linewidth=0.7)
    axes.legend(frameon=False, fontsize=9, loc="best")


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
    """Draw errors by timestep and the map of mismatches; a model without such features gives a figure that says so.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figures = require("matplotlib.figure", extra="report")
    figure = figures.Figure(figsize=(12, 4.6), dpi=110, facecolor="white", layout="constrained")
    figure.suptitle(title, fontsize=13, x=0.01, ha="left")
    if disturbed.relative_error:
        left, right = figure.subplots(1, 2)
        for side in ("top", "right"):
            left.spines[side].set_visible(False)
        _draw_errors(left, disturbed)
        _draw_mismatches(figure, right, disturbed)
    else:
        figure.text(0.5, 0.45, "no temporal feature found", ha="center", fontsize=12, color="#666666")
    figure.savefig(path, metadata={"Software": None})
