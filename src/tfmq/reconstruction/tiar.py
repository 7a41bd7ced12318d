"""Temporal information aware reconstruction (TFMQ-DM, equation 6): the temporal block's roundings, found for
all timesteps together.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tfmq.models.denoiser import Inputs
from tfmq.models.program import TIMESTEP
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import precision
from tfmq.progress import Advance
from tfmq.quantizers.steps import StepContext
from tfmq.reconstruction.learning import Learning
from tfmq.reconstruction.solvers import SOLVERS, Rounding, Samples, UnitProblem
from tfmq.reconstruction.unit import learned, restore
from tfmq.temporal.block import TemporalBlock

# Maximum number of (timestep, condition) pairs that a block with conditions is learned on.
MOST_PAIRS = 1024


class Config(Protocol):
    """How the roundings of the block are found."""

    @property
    def rounding(self) -> Rounding:
        """The solver."""

    @property
    def learning(self) -> Learning:
        """The hyper-parameters of learned rounding."""


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
    config: Config,
    *,
    batches: Iterable[Inputs] = (),
    seed: int,
    advance: Advance,
) -> None:
    """Minimise `sum_i ||g_i(h(t)) - g^_i(h^(t))||^2` over the roundings of `layers`, for t in the finite set.

    The error is summed over channels and features and averaged over a batch of timesteps; no image is
    involved. Features that also depend on a class or a pooled prompt are learned on the pairs that `batches`,
    the calibration calls, hold. A solver in closed form does it layer by layer. Where the error ends above
    that of the nearest codes, these stay.
    """
    rounding, learning = config.rounding, config.learning
    timesteps, conditions = condition_pairs(block, steps.timesteps.cpu(), batches)
    names = block.features
    size = min(learning.batch_size, block.trace.batch, len(timesteps))
    module = block.module

    def inputs_at(index: Tensor) -> Inputs:
        return block.at(timesteps[index], {name: values[index] for name, values in conditions.items()})

    def run(index: Tensor) -> dict[str, Tensor]:
        inputs = inputs_at(index)
        with steps.at(inputs.timestep):
            return block.run(inputs, names)

    def run_full(index: Tensor) -> dict[str, Tensor]:
        with precision(module, weights="full", inputs="full"):
            return block.run(inputs_at(index), names)

    batches_of = torch.arange(len(timesteps)).split(block.trace.batch)
    with torch.no_grad():
        parts = [(len(index), run_full(index)) for index in batches_of]
    target = {name: torch.cat([features[name][:count] for count, features in parts]) for name in names}

    def error(index: Tensor) -> Tensor:
        features = run(index)
        return sum(
            (features[name][: len(index)] - target[name][index]).square().sum(dim=1).mean() for name in names
        )  # type: ignore[return-value]

    def loss(generator: torch.Generator) -> Tensor:
        return error(torch.randperm(len(timesteps), generator=generator)[:size])

    @torch.no_grad()
    def whole_error() -> float:
        return sum(float(error(index)) * len(index) for index in batches_of)

    nearest, before = learned(layers), whole_error()
    samples = Samples(_filled(len(timesteps), block.trace.batch), run_full, run, loss)
    SOLVERS[rounding.solver].solve(UnitProblem(layers, samples, learning, advance), rounding, seed)
    if not whole_error() <= before:
        restore(layers, nearest)


def _filled(count: int, batch: int) -> tuple[Tensor, ...]:
    """Return the numbers below `count` in full batches, as a block computes no others: each number once or,
    evenly spread, once more.
    """
    rows = -(-count // batch) * batch
    return (torch.arange(rows) * count // rows).split(batch)
