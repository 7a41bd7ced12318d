"""Draw images on many workers: a batch each."""

from collections.abc import Callable
from functools import partial

import numpy as np

from tfmq.cluster.crew import Crew
from tfmq.evaluation.sampling import Images, batches, draw_batch
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress, silent


def _make(open_sampler: Callable[[], Sampler], steps: int, seed: int) -> Callable[[range], Images]:
    """Open the model in a worker, and return what draws a batch there."""
    return partial(draw_batch, open_sampler(), steps=steps, seed=seed)


def draw(
    crew: Crew,
    open_sampler: Callable[[], Sampler],
    num_images: int,
    *,
    steps: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Images:
    """Draw the images 0 to `num_images - 1` of the stream `seed`, uint8 `[N, H, W, C]`, as
    `tfmq.evaluation.sampling.draw` does.

    Args:
        crew: does it.
        open_sampler: is called in each worker; files that it reads must be there.
        num_images: how many.
        steps: number of denoising steps of each image.
        seed: seed of the stream of images.
        batch_size: images that a worker draws at once. Batches do not depend on the number of workers, so
            neither do the images.
        progress: shows a bar.

    Raises:
        ValueError: fewer than one image or step.
        SamplingError: the model draws no images.
        WorkerError: a batch could not be drawn.
    """
    ranges = batches(num_images, batch_size)
    parts: dict[int, Images] = {}
    with progress("sampling", num_images) as advance:
        for number, images in crew.team(partial(_make, open_sampler, steps, seed))(ranges):
            parts[number] = images
            advance(len(images))
    return np.concatenate([parts[number] for number in range(len(ranges))])
