"""Every extractor, registered by being imported. The libraries behind them are imported once one is built."""

from tfmq.evaluation.distribution import inception, lite, pixels  # noqa: F401
from tfmq.evaluation.distribution.extractor import EXTRACTORS

__all__ = ["EXTRACTORS"]
