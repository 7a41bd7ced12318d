"""Temporal information aware reconstruction (TFMQ-DM, equation 6): the temporal block's roundings, learned jointly over timesteps."""

import torch
from torch import Tensor

from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import precision
from tfmq.progress import Advance
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning, learn_rounding
from tfmq.temporal.block import TemporalBlock


@torch.no_grad()
def full_features(block: TemporalBlock, timesteps: Tensor) -> dict[str, Tensor]:
    """Return the full-precision temporal features `[S, d]` at `timesteps` `[S]`."""
    with precision(block.denoiser.module, weights="full", inputs="full"):
        return block(timesteps)


def reconstruct_temporal(
    block: TemporalBlock, layers: dict[str, CalibratedLayer], steps: StepContext, config: Learning, *, seed: int, advance: Advance
) -> None:
    """Minimise `sum_i ||g_i(h(t)) - g^_i(h^(t))||^2` over the roundings of `layers`, for t in the finite set.

    The error is summed over channels and features and averaged over a batch of timesteps; no image is involved. Every cacheable feature
    takes part; features that depend on a prompt are learned on the example's conditions.
    """
    timesteps = steps.timesteps.cpu()
    names = block.features
    with precision(block.denoiser.module, weights="full", inputs="full"), torch.no_grad():
        target = block(timesteps, names)
    size = min(block.trace.batch, len(timesteps))

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randperm(len(timesteps), generator=generator)[:size]
        inputs = block.at(timesteps[index])
        with steps.at(inputs.timestep):
            features = block.run(inputs, names)
        return sum((features[name][:size] - target[name][index]).square().sum(dim=1).mean() for name in names)  # type: ignore[return-value]

    learn_rounding(layers, loss, config, seed=seed, advance=advance)
