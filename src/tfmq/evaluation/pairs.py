"""Metrics of images pair by pair, drawn from the same noise: the contract and the registry."""

from collections.abc import Callable
from typing import Protocol

from tfmq.evaluation.paired import Floats, psnr, ssim
from tfmq.evaluation.perceptual import lpips
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFolder


class PairMetric(Protocol):
    """Returns one value for each pair of uint8 images `[N, H, W, 3]`, float64 `[N]`."""

    def __call__(self, reference: Images, images: Images, /) -> Floats: ...


# For each metric, what builds it from the place of the weights. Add a metric here.
PAIR_METRICS: dict[str, Callable[[WeightFolder], PairMetric]] = {
    "psnr": lambda _: psnr,
    "ssim": lambda _: ssim,
    "lpips": lpips,
}
