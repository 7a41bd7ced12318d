"""Move a quantized denoiser to another schedule: its tables are filled anew, its grids follow the nearest
calibrated timestep.
"""

import warnings

import torch
from torch import Tensor, nn

from tfmq.models.sampler import Sampler
from tfmq.nn.swap import parts_of, replace_module, steps_of
from tfmq.nn.temporal import CachedFeature, FeatureTable, cached_features
from tfmq.nn.watch import ModuleCall, watched
from tfmq.quantizers.steps import StepContext
from tfmq.temporal.block import TemporalBlock


def visited(sampler: Sampler, steps: int) -> Tensor:
    """Draw one image in `steps` steps and return the distinct timesteps that the denoiser was called at,
    ascending, float32.
    """
    seen: list[Tensor] = []

    def note(call: ModuleCall) -> None:
        seen.append(sampler.denoiser.bind(call.args, call.kwargs).timestep.float().cpu())

    with watched(sampler.denoiser.module, before=note), warnings.catch_warnings():
        # Silence the warning for uncalibrated timesteps: they are what this is about.
        warnings.filterwarnings("ignore", message=".*was not calibrated")
        sampler.run(range(1), steps=steps, seed=0)
    return torch.cat(seen).unique()


@torch.no_grad()
def rebake_tables(module: nn.Module, block: TemporalBlock, timesteps: Tensor) -> None:
    """Give the quantized `module` the finite set `timesteps` `[S]`, ascending, in place.

    Each table holds the full-precision features of `block` at the new timesteps. A grid of an activation at a
    new timestep is that of the nearest calibrated one, and so are the choice between a table and the block
    and the correction of the prediction: all were fitted on samples, which this does not see.

    Raises:
        ValueError: `block` is of another architecture.
    """
    steps: StepContext = steps_of(module)
    timesteps = timesteps.to(steps.timesteps.device, torch.float32)
    nearest, _ = steps.lookup(timesteps)
    cached = cached_features(module)
    missing = sorted(cached.keys() - set(block.cacheable))
    if missing:
        raise ValueError(
            f"{missing[0]} has a table, but is no temporal feature of the "
            "reference; pass the model that was quantized"
        )
    full = block(timesteps, list(cached))
    for part in parts_of(module):
        part.take_rows(nearest)
    steps.replace(timesteps)
    for name, child in cached.items():
        table = FeatureTable(len(timesteps), full[name].shape[1], child.table.table_format).to(
            timesteps.device
        )
        table.fit(full[name])
        use = child.use_table[nearest]
        moved = CachedFeature(child.block, table, steps, everywhere=bool(use.all()))
        moved.use_table = use.clone()
        replace_module(module, name, moved)
