"""LPIPS: the distance of two images in the features of AlexNet, by torchmetrics."""

from collections.abc import Callable

import numpy as np
import torch

from tfmq.errors import require
from tfmq.evaluation.paired import Floats
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFile, WeightFolder, check_state

FILE = WeightFile(
    name="alexnet-owt-7be5be79.pth",
    digest="7be5be79",
    origin="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)


def lpips(weights: WeightFolder) -> Callable[[Images, Images], Floats]:
    """Build the metric (Zhang et al., 2018; version 0.1, AlexNet); its linear heads come with torchmetrics.

    Raises:
        MissingFileError: AlexNet's file is not there; says where it belongs.
        ForeignFileError: it is no such file.
        MissingExtraError: torchmetrics or torchvision is not installed.
    """
    path = weights.find(
        FILE, instead="there is no lpips without it; --metrics psnr,ssim compares pairs without a network"
    )
    check_state(path)
    require("torchvision", extra="eval")
    library = require("torchmetrics.image.lpip", extra="eval")
    with weights.as_cache():
        metric = library.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    @torch.no_grad()
    def distance(reference: Images, images: Images) -> Floats:
        pairs = zip(reference, images, strict=True)
        # One pair at a time: torchmetrics gives the mean of a batch.
        return np.array(
            [
                float(
                    metric(*(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255 for image in pair))
                )
                for pair in pairs
            ]
        )

    return distance
