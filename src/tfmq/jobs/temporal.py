"""The stage of the temporal block: learn its roundings (TIAR), and put tables in its place."""

from torch import Tensor

from tfmq.jobs.job import Job, Work
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers
from tfmq.reconstruction.solvers import work_amount
from tfmq.reconstruction.tiar import reconstruct_temporal
from tfmq.reconstruction.unit import learned, restore, settle
from tfmq.temporal.cache import install_tables


def maintained(job: Job, work: Work) -> dict[str, CalibratedLayer]:
    """Return the layers of the temporal block that this stage answers for; none where the recipe treats them
    like any other.
    """
    if job.recipe.temporal.maintenance == "none":
        return {}
    names = {layer.name for layer in work.block.trace.temporal if layer.name in work.plan.layers}
    return {name: layer for name, layer in calibrated_layers(job.denoiser.module).items() if name in names}


def maintain_temporal(job: Job, work: Work) -> None:
    """Learn the roundings of the temporal block, and install the tables that the recipe asks for."""
    config, layers = job.recipe.temporal, maintained(job, work)
    if not layers:
        return
    for layer in layers.values():
        settle(layer)
    restore(layers, job.journal.stage("temporal", lambda: _learned(job, work, layers)))
    if config.maintenance != "block":
        scope = config.scope if config.maintenance == "selected" else None
        features = {name: work.full[name] for name in work.block.cacheable}
        install_tables(work.block, features, work.steps, table_format=config.table, scope=scope)


def _learned(job: Job, work: Work, layers: dict[str, CalibratedLayer]) -> dict[str, Tensor]:
    config = job.recipe.temporal
    amount = work_amount(config.rounding, config.learning, len(layers))
    with job.progress("temporal block: TIAR", amount) as advance:
        reconstruct_temporal(
            work.block,
            layers,
            work.steps,
            config,
            batches=job.store,
            seed=job.seed_of("temporal"),
            advance=advance,
        )
    return learned(layers)
