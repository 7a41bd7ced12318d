"""Every metric of distributions, registered by being imported."""

from tfmq.evaluation.distribution import frechet, inception_score, kernel, manifold  # noqa: F401
from tfmq.evaluation.distribution.metric import SET_METRICS

__all__ = ["SET_METRICS"]
