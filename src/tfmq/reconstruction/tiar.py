"""Temporal information aware reconstruction (TFMQ-DM, equation 6): the temporal block's roundings, learned
jointly over timesteps.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from tfmq.models.denoiser import Inputs
from tfmq.models.program import TIMESTEP
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import precision
from tfmq.progress import Advance
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning, learn_rounding
from tfmq.temporal.block import TemporalBlock

# Maximum number of (timestep, condition) pairs that a block with conditions is learned on.
MOST_PAIRS = 1024


@torch.no_grad()
def full_features(
    block: TemporalBlock, timesteps: Tensor, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return every cacheable feature (or `names`) in full precision, `[S, d]` at `timesteps` `[S]`."""
    with precision(block.denoiser.module, weights="full", inputs="full"):
        return block(timesteps, names)


def condition_pairs(
    block: TemporalBlock, timesteps: Tensor, batches: Iterable[Inputs]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return what the temporal block is learned on: timesteps `[P]` and its conditions `[P, ...]` by name.

    Where the block depends on the timestep alone these are `timesteps`; else the (timestep, condition) pairs
    of the calibration calls, at most `MOST_PAIRS` of them, evenly spaced.
    """
    if not block.conditions:
        return timesteps, {}
    wanted = {TIMESTEP, *block.conditions}
    calls = [
        {name: tensor for name, tensor in block.denoiser.labelled(inputs) if name in wanted}
        for inputs in batches
    ]
    if not calls:
        return timesteps, {}
    pairs = {name: torch.cat([call[name] for call in calls]) for name in sorted(wanted)}
    stride = -(-len(pairs[TIMESTEP]) // MOST_PAIRS)
    kept = {name: values[::stride] for name, values in pairs.items()}
    return kept.pop(TIMESTEP), kept


def reconstruct_temporal(
    block: TemporalBlock,
    layers: dict[str, CalibratedLayer],
    steps: StepContext,
    config: Learning,
    *,
    batches: Iterable[Inputs] = (),
    seed: int,
    advance: Advance,
) -> None:
    """Minimise `sum_i ||g_i(h(t)) - g^_i(h^(t))||^2` over the roundings of `layers`, for t in the finite set.

    The error is summed over channels and features and averaged over a batch of timesteps; no image is
    involved. Features that also depend on a class or a pooled prompt are learned on the pairs that `batches`,
    the calibration calls, hold.
    """
    timesteps, conditions = condition_pairs(block, steps.timesteps.cpu(), batches)
    names = block.features
    size = min(config.batch_size, block.trace.batch, len(timesteps))

    def inputs_at(index: Tensor) -> Inputs:
        return block.at(timesteps[index], {name: values[index] for name, values in conditions.items()})

    with precision(block.module, weights="full", inputs="full"), torch.no_grad():
        parts = [
            (len(index), block.run(inputs_at(index), names))
            for index in torch.arange(len(timesteps)).split(block.trace.batch)
        ]
    target = {name: torch.cat([features[name][:count] for count, features in parts]) for name in names}

    def loss(generator: torch.Generator) -> Tensor:
        index = torch.randperm(len(timesteps), generator=generator)[:size]
        inputs = inputs_at(index)
        with steps.at(inputs.timestep):
            features = block.run(inputs, names)
        return sum((features[name][:size] - target[name][index]).square().sum(dim=1).mean() for name in names)  # type: ignore[return-value]

    learn_rounding(layers, loss, config, seed=seed, advance=advance)
