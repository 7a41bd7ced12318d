"""FID and sFID: the Frechet distance between Gaussians fitted to features, by torchmetrics."""

from collections.abc import Mapping
from typing import Any

import torch

from tfmq.errors import require
from tfmq.evaluation.distribution.features import Features, Kind, Moments
from tfmq.evaluation.distribution.metric import Given, Score, drawn_by, register_metric

LIBRARY = "torchmetrics.image.fid"


def _put_moments(metric: Any, moments: Moments, kind: Kind) -> None:
    """Set the sums from which torchmetrics computes mean and covariance to those of two images, from which
    exactly these follow.

    With `n` images it keeps `sum = n mean` and `cov_sum = (n - 1) covariance + n mean mean^T`.
    """
    if kind not in moments.of:
        raise ValueError(
            f"the statistics file holds {' and '.join(sorted(moments.of))} "
            f"features, not {kind}; pass images instead"
        )
    mean, covariance = (values.double() for values in moments.of[kind])
    if mean.shape != metric.real_features_sum.shape or covariance.shape != metric.real_features_cov_sum.shape:
        raise ValueError(
            f"the statistics are of {len(mean)} features, the extractor gives "
            f"{len(metric.real_features_sum)}; use the one they came from"
        )
    metric.real_features_num_samples += 2
    metric.real_features_sum += 2 * mean
    metric.real_features_cov_sum += covariance + 2 * torch.outer(mean, mean)


def frechet_distance(images: Features, others: Features | Moments, kind: Kind) -> float:
    """Return `||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^1/2)` of the means and covariances of two sets (Heusel
    et al., 2017, equation 6).

    torchmetrics sums features in float64 as they stream by; no set is held in memory.

    Raises:
        ValueError: a set of fewer than two images, or statistics of other features.
        MissingExtraError: torchmetrics is not installed.
    """
    library = require(LIBRARY, extra="eval")
    width = next(images.chunks(kind)).shape[1]
    with drawn_by(0):
        metric = library.FrechetInceptionDistance(feature=Given(width))
        for chunk in images.chunks(kind):
            metric.update(chunk.double(), real=False)
        if isinstance(others, Moments):
            _put_moments(metric, others, kind)
        else:
            for chunk in others.chunks(kind):
                metric.update(chunk.double(), real=True)
        if min(int(metric.real_features_num_samples), int(metric.fake_features_num_samples)) < 2:
            raise ValueError("a Frechet distance needs at least two images on either side; draw more")
        return float(metric.compute())


class _Frechet:
    """The distance of one kind of features, under a metric's `name`."""

    library = LIBRARY
    name: str
    kind: Kind
    compares = True
    of_moments = True

    def __call__(
        self, images: Features, others: Features | Moments | None, *, seed: int
    ) -> Mapping[str, Score]:
        assert others is not None
        return {self.name: Score(frechet_distance(images, others, self.kind))}


@register_metric("fid")
class Fid(_Frechet):
    """Frechet distance of pooled features: FID where they are Inception's."""

    name = "fid"
    kind: Kind = "pool"


@register_metric("sfid")
class SpatialFid(_Frechet):
    """Frechet distance of spatial features (Nash et al., 2021): no library has it, so it is the library's
    distance on those features.
    """

    name = "sfid"
    kind: Kind = "spatial"
