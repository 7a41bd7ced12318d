"""IS: how sure a classifier is of each image and how varied it finds them all, by torchmetrics."""

from collections.abc import Mapping

from tfmq.errors import require
from tfmq.evaluation.distribution.features import Features, Kind, Moments
from tfmq.evaluation.distribution.metric import Given, Score, drawn_by, register_metric

LIBRARY = "torchmetrics.image.inception"
# Number of parts of the images, as in Salimans et al. (2016). The score is the mean over them.
SPLITS = 10


@register_metric("is")
class InceptionScore:
    """`exp E KL(p(y|x) || p(y))`, mean and deviation over ten splits (Salimans et al., 2016). One set
    alone.
    """

    library = LIBRARY
    kind: Kind = "logits"
    compares = False
    of_moments = False

    def __call__(
        self, images: Features, others: Features | Moments | None, *, seed: int
    ) -> Mapping[str, Score]:
        library = require(LIBRARY, extra="eval")
        if len(images) < 2 * SPLITS:
            raise ValueError(
                f"the inception score takes the mean over {SPLITS} splits, so it "
                f"needs at least {2 * SPLITS} images; got {len(images)}"
            )
        with drawn_by(seed):
            metric = library.InceptionScore(
                feature=Given(next(images.chunks(self.kind)).shape[1]), splits=SPLITS
            )
            for chunk in images.chunks(self.kind):
                metric.update(chunk.double())
            mean, deviation = metric.compute()
        return {"is": Score(float(mean), float(deviation))}
