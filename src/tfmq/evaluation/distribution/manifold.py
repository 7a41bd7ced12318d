"""Precision and recall: which images lie within the manifold of the others, by torch-fidelity."""

from collections.abc import Mapping

from tfmq.errors import require
from tfmq.evaluation.distribution.features import Features, Kind, Moments, gathered
from tfmq.evaluation.distribution.metric import Score, features_of, register_metric

LIBRARY = "torch_fidelity.metric_prc"
# Number of the neighbour whose distance is the radius around an image's features.
NEIGHBOURS = 3


@register_metric("precision-recall")
class PrecisionRecall:
    """Shares of images within the balls around the third neighbours of the other set (Kynkaanniemi et al.,
    2019).
    """

    library = LIBRARY
    kind: Kind = "pool"
    compares = True
    of_moments = False

    def __call__(
        self, images: Features, others: Features | Moments | None, *, seed: int
    ) -> Mapping[str, Score]:
        real = features_of(others, "precision-recall")
        if min(len(images), len(real)) <= NEIGHBOURS:
            raise ValueError(
                f"precision-recall looks at {NEIGHBOURS} neighbours, so it needs "
                f"more than {NEIGHBOURS} images on either side"
            )
        library = require(LIBRARY, extra="eval")
        options = {
            "prc_neighborhood": NEIGHBOURS,
            "prc_batch_size": 10_000,
            "save_cpu_ram": True,
            "verbose": False,
        }
        found = library.prc_features_to_metric(
            gathered(images, self.kind), gathered(real, self.kind), **options
        )
        return {name: Score(float(found[name])) for name in ("precision", "recall")}
