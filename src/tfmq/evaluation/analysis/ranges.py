"""What temporal layers read at each timestep: the ranges that one scale for all timesteps would have to cover."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.temporal.block import TemporalBlock


@dataclass(frozen=True)
class Ranges:
    """Least and greatest value of each temporal layer's input at each timestep, `[S]` each, in full precision."""

    timesteps: Tensor
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]


@contextmanager
def _inputs(module: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what the submodules `names` are called with while the context is open; a later call overwrites an earlier one."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0]

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(module.get_submodule(name).register_forward_pre_hook(keep(name)).remove)
        yield found


@torch.no_grad()
def temporal_ranges(block: TemporalBlock, timesteps: Tensor) -> Ranges:
    """Return the input ranges of every temporal layer at `timesteps` `[S]`; conditions are those of the block's example."""
    names = [layer.name for layer in block.trace.temporal]
    low: dict[str, list[Tensor]] = {name: [] for name in names}
    high: dict[str, list[Tensor]] = {name: [] for name in names}
    for chunk in timesteps.split(block.trace.batch):
        with _inputs(block.module, names) as found:
            block.run(block.at(chunk), names)
        for name in names:
            rows = found[name][: len(chunk)].flatten(1)
            low[name].append(rows.amin(dim=1).cpu())
            high[name].append(rows.amax(dim=1).cpu())
    return Ranges(timesteps.cpu(), {name: torch.cat(parts) for name, parts in low.items()}, {name: torch.cat(parts) for name, parts in high.items()})
