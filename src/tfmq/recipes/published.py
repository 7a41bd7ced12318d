"""Published figures, which a recipe may carry."""

from dataclasses import dataclass
from math import inf

from tfmq.errors import shown


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published figure of the full-precision model: what `tfmq evaluate` must find before it judges the
    quantized one.

    Attributes:
        metric: its name in `tfmq evaluate`, such as `fid`.
        value: what was published.
        tolerance: the largest difference, in the metric's own units, that is no sign of another protocol.
        num_images: number of images that the figure holds for; with others it is not compared.
        steps: number of denoising steps that it holds for.
        source: where it was published.
    """

    metric: str
    value: float
    tolerance: float
    num_images: int
    steps: int
    source: str

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < inf or self.num_images < 1 or self.steps < 1:
            numbers = f"{self.tolerance}, {self.num_images} and {self.steps}"
            raise ValueError(
                "published tolerance, num_images and steps must be positive, "
                f"got {numbers} for {shown(self.metric)}"
            )
