"""What temporal layers read and give at each timestep: the ranges that one scale for all timesteps would have
to cover.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.nn.operation import operand
from tfmq.nn.submodules import named
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.temporal.block import TemporalBlock


@dataclass(frozen=True)
class Bounds:
    """Least and greatest value by layer and timestep, `[S]` each."""

    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]


@dataclass(frozen=True)
class Ranges:
    """Bounds of what each temporal layer reads and gives at each timestep `[S]`, in full precision."""

    timesteps: Tensor
    inputs: Bounds
    outputs: Bounds


@contextmanager
def _inputs(module: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the submodules `names` are called with while the context is open; a later call overwrites
    an earlier one.
    """
    found: dict[str, Tensor] = {}

    def keep(call: ModuleCall) -> None:
        found[call.name] = operand(call.args, call.kwargs)

    with all_watched(named(module, names), before=keep):
        yield found


def _bounds(values: Mapping[str, Tensor]) -> Bounds:
    rows = {name: value.flatten(1).cpu() for name, value in values.items()}
    return Bounds(
        {name: value.amin(dim=1) for name, value in rows.items()},
        {name: value.amax(dim=1) for name, value in rows.items()},
    )


@torch.no_grad()
def temporal_ranges(block: TemporalBlock, timesteps: Tensor) -> Ranges:
    """Return the ranges of every temporal layer at `timesteps` `[S]`; conditions are those of the block's
    example.
    """
    names = [layer.name for layer in block.trace.temporal]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs: dict[str, list[Tensor]] = {name: [] for name in names}
    for chunk in timesteps.split(block.trace.batch):
        with _inputs(block.module, names) as found:
            given = block.run(block.at(chunk), names)
        for name in names:
            inputs[name].append(found[name][: len(chunk)])
            outputs[name].append(given[name][: len(chunk)])
    joined = ({name: torch.cat(parts) for name, parts in values.items()} for values in (inputs, outputs))
    return Ranges(timesteps.cpu(), *map(_bounds, joined))
