"""Cache-based maintenance (Temporal Feature Matters, Huang et al., 2025): tables in front of temporal
features.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tfmq.nn.operation import weight_of
from tfmq.nn.swap import replace_module
from tfmq.nn.temporal import CachedFeature, FeatureTable, SkippedLayer, TableFormat
from tfmq.quantizers.steps import StepContext
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.disturbance import disturbance
from tfmq.temporal.selection import Scope, select_tables


@torch.no_grad()
def quantized_features(
    block: TemporalBlock, steps: StepContext, names: Sequence[str] | None = None
) -> dict[str, Tensor]:
    """Return every cacheable feature (or `names`), `[S, d]`, as a quantized model computes it at each
    calibrated timestep.
    """
    names = block.cacheable if names is None else names
    parts = []
    for timestep in steps.timesteps.split(block.trace.batch):
        inputs = block.at(timestep)
        with steps.at(inputs.timestep):
            features = block.run(inputs, names)
        parts.append({name: feature[: len(timestep)] for name, feature in features.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def install_tables(
    block: TemporalBlock,
    full: dict[str, Tensor],
    steps: StepContext,
    *,
    table_format: TableFormat,
    scope: Scope | None = None,
) -> None:
    """Put a table of the full-precision features `[S, d]` in front of every cacheable one, in the block's
    module.

    With a `scope`, each choice of that scope takes the table or the quantized block, whichever disturbs the
    features less. Where every feature of the model comes from its table at every step, the layers that only
    feed them are skipped too.
    """
    timesteps = steps.timesteps
    every = torch.arange(len(timesteps), device=timesteps.device)
    tables = {
        name: FeatureTable(len(timesteps), feature.shape[1], table_format).to(feature.device)
        for name, feature in full.items()
    }
    for name, feature in full.items():
        tables[name].fit(feature)
    chosen = {name: torch.ones(len(timesteps), dtype=torch.bool) for name in full}
    if scope is not None:
        through_block = disturbance(timesteps, full, quantized_features(block, steps)).relative_error
        through_table = disturbance(
            timesteps, full, {name: table(every) for name, table in tables.items()}
        ).relative_error
        chosen = select_tables(through_block, through_table, scope=scope)
    for name, table in tables.items():
        cached = CachedFeature(
            block.module.get_submodule(name), table, steps, everywhere=bool(chosen[name].all())
        )
        cached.use_table.copy_(chosen[name])
        replace_module(block.module, name, cached)
    if set(block.features) == set(full) and all(bool(use.all()) for use in chosen.values()):
        _skip_inner(block, steps)


def _skip_inner(block: TemporalBlock, steps: StepContext) -> None:
    for layer in block.trace.temporal:
        if layer.name not in block.features:
            inner = block.module.get_submodule(layer.name)
            replace_module(block.module, layer.name, SkippedLayer(inner, weight_of(inner).shape[0], steps))
