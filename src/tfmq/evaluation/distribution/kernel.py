"""KID: the squared maximum mean discrepancy with a cubic kernel, by torchmetrics."""

from collections.abc import Mapping

from tfmq.errors import require
from tfmq.evaluation.distribution.features import Features, Kind, Moments
from tfmq.evaluation.distribution.metric import Given, Score, drawn_by, features_of, register_metric

LIBRARY = "torchmetrics.image.kid"
# Number of images in a random subset, and number of subsets that the distance is the mean over.
SUBSET, SUBSETS = 1000, 100


@register_metric("kid")
class Kid:
    """Mean and deviation over 100 subsets of 1000 images, or of as many as the smaller set has (Binkowski et
    al., 2018).

    Where subsets would be both whole sets, it is one value without a deviation.
    """

    library = LIBRARY
    kind: Kind = "pool"
    compares = True
    of_moments = False

    def __call__(
        self, images: Features, others: Features | Moments | None, *, seed: int
    ) -> Mapping[str, Score]:
        real = features_of(others, "kid")
        library = require(LIBRARY, extra="eval")
        size = min(SUBSET, len(images), len(real))
        if size < 2:
            raise ValueError("kid needs at least two images on either side; draw more")
        whole = size == len(images) == len(real)
        width = next(images.chunks(self.kind)).shape[1]
        with drawn_by(seed):
            metric = library.KernelInceptionDistance(
                feature=Given(width), subsets=1 if whole else SUBSETS, subset_size=size
            )
            for source, is_real in ((real, True), (images, False)):
                for chunk in source.chunks(self.kind):
                    metric.update(chunk, real=is_real)
            mean, deviation = metric.compute()
        return {"kid": Score(float(mean), None if whole else float(deviation))}
