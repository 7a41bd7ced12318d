"""The extractor of the papers: the Inception network that FID is defined by, as torch-fidelity has it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tfmq.errors import require
from tfmq.evaluation.distribution.extractor import register_extractor
from tfmq.evaluation.distribution.features import Kind
from tfmq.evaluation.sampling import Images
from tfmq.evaluation.weights import WeightFile, WeightFolder, check_state
from tfmq.nn.watch import ModuleCall, watched
from tfmq.storage.digest import file_digest

FILE = WeightFile(
    name="weights-inception-2015-12-05-6726825d.pth",
    digest="6726825d",
    origin="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
)
# sFID reads the first channels of this branch, 17 x 17 places of 7 channels (Nash et al., 2021).
BRANCH, CHANNELS = "Mixed_6d.branch1x1", 7
OUTPUTS = ["2048", "logits_unbiased"]


class Inception:
    """The pooled 2048 features, 2023 spatial ones, and the class scores without bias of the TensorFlow
    Inception of 2015.
    """

    kinds: tuple[Kind, ...] = ("pool", "spatial", "logits")

    def __init__(self, network: nn.Module, digest: str) -> None:
        self.network = network
        self.digest = digest

    def describe(self) -> dict[str, Any]:
        """Return what the features depend on."""
        return {"name": "inception", "file": FILE.name, "sha256": self.digest}

    @torch.no_grad()
    def __call__(self, images: Images) -> Mapping[Kind, Tensor]:
        places: list[Tensor] = []

        def keep(call: ModuleCall) -> None:
            places.append(call.output[:, :CHANNELS].flatten(1))

        with watched(self.network.get_submodule(BRANCH), after=keep):
            pool, logits = self.network(torch.from_numpy(images).permute(0, 3, 1, 2))
        return {"pool": pool, "spatial": places[0], "logits": logits}


@register_extractor("inception")
def inception(weights: WeightFolder) -> Inception:
    """Build the network from its weight file.

    Raises:
        MissingFileError: the file is not there; says where it belongs and what can be had without it.
        ForeignFileError: it is no such file.
        MissingExtraError: torch-fidelity is not installed.
    """
    path = weights.find(
        FILE, instead="--extractor pooled-pixels or efficientnet-lite0 compare without it, under other names"
    )
    library = require("torch_fidelity.feature_extractor_inceptionv3", extra="eval")
    # The library unpickles the file without a guard. What passes this check holds tensors and nothing else.
    check_state(path)
    network = library.FeatureExtractorInceptionV3(
        "inception-v3-compat", OUTPUTS, feature_extractor_weights_path=str(path)
    )
    return Inception(network, file_digest(path))
