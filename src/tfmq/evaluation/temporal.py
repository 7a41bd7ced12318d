"""The disturbance of a finished quantized model's temporal features against its reference."""

import torch
from torch import nn

from tfmq.models.sampler import Sampler
from tfmq.nn.swap import is_quantized, steps_of
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import quantized_features
from tfmq.temporal.disturbance import Disturbance, disturbance


@torch.no_grad()
def temporal_disturbance(reference: Sampler, quantized: nn.Module) -> Disturbance:
    """Compare the temporal features of `quantized` with those of the reference at every calibrated timestep.

    Features that depend on a class or a prompt too are compared on the conditions of the reference's example.

    Raises:
        ValueError: `quantized` was not quantized by tfmq or the reference was, or they differ in
            architecture.
    """
    if is_quantized(reference.denoiser.module):
        raise ValueError("the reference is quantized itself; pass the full-precision model")
    if not is_quantized(quantized):
        raise ValueError("the model to compare is not quantized by tfmq; pass what tfmq quantize wrote")
    block, steps = TemporalBlock(reference.denoiser, reference.example()), steps_of(quantized)
    known = {name for name, _ in quantized.named_modules()}
    missing = sorted({call.module for call in block.trace.program.calls if call.module} - known)
    if missing:
        raise ValueError(
            f"the reference has {missing[0]}, which the quantized model lacks; "
            "compare it with the model that it was made from"
        )
    full = block(steps.timesteps, block.features)
    through = quantized_features(block.of(quantized), steps, block.features)
    for name, feature in full.items():
        if feature.shape != through[name].shape:
            raise ValueError(
                f"{name} has width {feature.shape[1]} in the reference and "
                f"{through[name].shape[1]} in the quantized model"
            )
    return disturbance(steps.timesteps, full, through)
