"""The map of temporal information mismatch: which timestep a quantized feature looks like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfmq.report.curves import drawing


def write_mismatch(path: Path, disturbed: Mapping[str, Any], *, title: str) -> None:
    """Draw the share of features at each timestep that are nearest to each timestep; without a mismatch it is
    the diagonal.
    """
    table = np.array(disturbed["mismatch"], dtype=float)
    features = len(disturbed["nearest"])
    with drawing(path, title=title, size=(6.4, 5.6)) as (figure, axes):
        image = axes.imshow(
            table / max(1, features), cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="equal"
        )
        ticks = np.unique(np.linspace(0, len(table) - 1, min(6, len(table))).round().astype(int))
        labels = [f"{disturbed['timesteps'][index]:g}" for index in ticks]
        axes.set_xticks(ticks, labels)
        axes.set_yticks(ticks, labels)
        axes.set_xlabel("timestep t' of the nearest full-precision feature")
        axes.set_ylabel("timestep t of the quantized feature")
        count = disturbed["mismatches"]
        axes.set_title(f"{count} of {features * len(table)} features mismatched", fontsize=11, loc="left")
        figure.colorbar(image, ax=axes, label="share of features")
