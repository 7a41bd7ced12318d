"""What an evaluation does, as a value, and the tools that it needs before the first image is drawn."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tfmq.errors import require

# Importing these modules registers what they define.
from tfmq.evaluation.adherence import scene_judge  # noqa: F401
from tfmq.evaluation.adherence.judge import ADHERENCE, JUDGES, Judge
from tfmq.evaluation.distribution.extractor import STANDARD, Extractor
from tfmq.evaluation.distribution.extractors import EXTRACTORS
from tfmq.evaluation.distribution.metrics import SET_METRICS
from tfmq.evaluation.pairs import PAIR_METRICS, PairMetric
from tfmq.evaluation.text import CLIP, ClipScore, clip_score
from tfmq.evaluation.weights import WeightFolder

CLIP_METRIC, TRAJECTORY = "clip", "trajectory"
DEFAULT = ("fid", "kid", "psnr", "ssim", "trajectory")


def metric_names() -> tuple[str, ...]:
    """Return every metric's name: of sets of images, of text and image, of what was asked for, of pairs of
    images, of their trajectories.
    """
    return (*SET_METRICS, CLIP_METRIC, ADHERENCE, *PAIR_METRICS, TRAJECTORY)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One evaluation: the images 0 to `num_images - 1` of the stream `seed`, of which the first `num_pairs`
    are compared pair by pair.

    `judge` names what reads the images for the metric adherence; a model that brings its own says which in
    its `judge.json`.
    """

    num_images: int
    steps: int
    seed: int = 0
    batch_size: int = 16
    num_pairs: int = 64
    metrics: tuple[str, ...] = DEFAULT
    extractor: str = STANDARD
    clip: str = CLIP
    judge: str | None = None

    def __post_init__(self) -> None:
        for name in ("num_images", "steps", "batch_size", "num_pairs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        unknown = [name for name in self.metrics if name not in metric_names()]
        if unknown or not self.metrics:
            raise ValueError(
                f"there is no metric {', '.join(unknown) or 'to compute'}; "
                f"choose some of {', '.join(metric_names())}"
            )
        if self.extractor not in EXTRACTORS:
            raise ValueError(
                f"there is no extractor {self.extractor!r}; choose one of {', '.join(EXTRACTORS)}"
            )
        if ADHERENCE in self.metrics and self.judge not in JUDGES:
            raise ValueError(
                f"adherence needs a judge of the images, one of {', '.join(JUDGES)}; "
                f"this model brings {self.judge or 'none'}"
            )

    @property
    def of_sets(self) -> tuple[str, ...]:
        """The metrics that are computed on features."""
        return tuple(name for name in self.metrics if name in SET_METRICS)

    @property
    def of_pairs(self) -> tuple[str, ...]:
        """The metrics of pairs of images."""
        return tuple(name for name in self.metrics if name in PAIR_METRICS)

    @property
    def draws_sets(self) -> bool:
        """Whether images are drawn for metrics of whole sets."""
        return bool(self.of_sets) or bool({CLIP_METRIC, ADHERENCE} & set(self.metrics))

    @property
    def draws_pairs(self) -> bool:
        """Whether images are drawn for metrics of pairs."""
        return bool(self.of_pairs) or TRAJECTORY in self.metrics


@dataclass(frozen=True)
class Tools:
    """What the metrics of one evaluation need, ready: extractor, metrics of pairs by name, CLIP score,
    judge.
    """

    extractor: Extractor | None
    pairs: Mapping[str, PairMetric]
    clip: ClipScore | None
    judge: Judge | None = None

    def describe(self) -> dict[str, Any]:
        """Return what the values depend on beside the images, as JSON values."""
        return {
            "extractor": None if self.extractor is None else self.extractor.describe(),
            "pairs": sorted(self.pairs),
            "clip": self.clip is not None,
            "judge": [] if self.judge is None else list(self.judge.attributes),
        }


def prepare(settings: Settings, weights: WeightFolder) -> Tools:
    """Find every weight and build every tool, so that what is missing is known before hours of drawing.

    Raises:
        MissingFileError: a weight file is not there; says which and where it belongs.
        MissingExtraError: a library is not installed.
        ValueError: a metric needs features that the extractor does not give.
    """
    extractor = EXTRACTORS[settings.extractor](weights) if settings.of_sets else None
    for name in settings.of_sets:
        require(SET_METRICS[name].library, extra="eval")
        kind = SET_METRICS[name].kind
        if extractor is not None and kind not in extractor.kinds:
            given = ", ".join(extractor.kinds)
            raise ValueError(
                f"{name} needs {kind} features, and the extractor {settings.extractor} "
                f"gives {given}; leave it out of --metrics"
            )
    pairs = {name: PAIR_METRICS[name](weights) for name in settings.of_pairs}
    clip = clip_score(settings.clip) if CLIP_METRIC in settings.metrics else None
    judge = JUDGES[settings.judge]() if ADHERENCE in settings.metrics and settings.judge else None
    return Tools(extractor, pairs, clip, judge)
