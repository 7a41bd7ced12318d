"""What an evaluation finds, as values."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tfmq.evaluation.deviation import Trajectory, summarized
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.settings import TRAJECTORY, Settings
from tfmq.evaluation.stages import StoredResults

# Models and other sets of images, as results name them.
FULL, QUANTIZED, REAL, PAIRS = "full precision", "quantized", "real", "pairs"


@dataclass(frozen=True)
class Row:
    """One value of a set of images: `metric` of the images of `model`, compared with those of `against`, if
    with any.

    `deviation` is a metric's standard deviation over subsets; for shares of images, half the width of the 95
    % interval.
    """

    metric: str
    model: str
    against: str | None
    value: float
    deviation: float | None


@dataclass(frozen=True)
class Spread:
    """Mean, least and greatest of a metric over pairs."""

    mean: float
    min: float
    max: float


@dataclass(frozen=True)
class Paired:
    """Metrics of pairs by name, the trajectory where it was asked for, and the first pairs themselves, uint8
    `[n, H, W, 3]`.
    """

    count: int
    metrics: Mapping[str, Spread]
    trajectory: Trajectory | None
    reference: Images
    quantized: Images


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: values of sets of images, of pairs, and how the published figures compare."""

    rows: tuple[Row, ...]
    paired: Paired | None
    baseline: tuple[Mapping[str, Any], ...]


def summary(stored: StoredResults, settings: Settings) -> Paired:
    """Return the summary of the pairs."""
    metrics = {}
    for name in settings.of_pairs:
        values = stored.joined(name).numpy()
        metrics[name] = Spread(float(np.mean(values)), float(np.min(values)), float(np.max(values)))
    trajectory = None
    if TRAJECTORY in settings.metrics:
        first = next(stored.parts())
        latent = stored.joined("latent") if "latent" in first else None
        trajectory = summarized(first["timesteps"], stored.joined("deviation", dim=1), latent)
    pixels = (stored.joined(f"{name} images").numpy() for name in (FULL, QUANTIZED))
    return Paired(stored.count, metrics, trajectory, *pixels)
