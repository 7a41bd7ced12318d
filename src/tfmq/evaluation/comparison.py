"""A quantized model beside its reference: the same noise through both."""

from dataclasses import dataclass

from tfmq.evaluation.paired import PairedFidelity, paired_fidelity
from tfmq.evaluation.sampling import Images, draw
from tfmq.evaluation.temporal import temporal_disturbance
from tfmq.models.sampler import Sampler
from tfmq.progress import Progress, silent
from tfmq.temporal.disturbance import Disturbance


@dataclass(frozen=True)
class Comparison:
    """Images of both models, uint8 `[N, H, W, C]`, how near they are pair by pair, and how far the temporal
    features are disturbed.
    """

    reference: Images
    quantized: Images
    fidelity: PairedFidelity
    temporal: Disturbance


def compare(
    reference: Sampler,
    quantized: Sampler,
    *,
    num_images: int,
    steps: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress = silent,
) -> Comparison:
    """Draw the same images with both samplers and compare them.

    Raises:
        ValueError: the models do not belong together.
        SamplingError: a model draws no images.
    """
    shapes = [tuple(sampler.example().sample.shape[1:]) for sampler in (reference, quantized)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"the reference denoises samples of shape {shapes[0]}, the quantized "
            f"model {shapes[1]}; compare it with its own original"
        )
    disturbed = temporal_disturbance(reference, quantized.denoiser.module)
    full, low = (
        draw(
            sampler,
            num_images,
            steps=steps,
            seed=seed,
            batch_size=batch_size,
            description=f"sampling: {name}",
            progress=progress,
        )
        for sampler, name in ((reference, "full precision"), (quantized, "quantized"))
    )
    return Comparison(full, low, paired_fidelity(full, low), disturbed)
