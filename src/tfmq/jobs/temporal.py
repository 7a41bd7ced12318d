"""The stage of the temporal block: learn its roundings (TIAR), and put tables in its place."""

from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors, Where
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


def settle_temporal(job: Job, work: Work) -> None:
    """Let the temporal block compute with its nearest codes, where its stage begins."""
    for layer in maintained(job, work).values():
        settle(layer)


def _install(job: Job, work: Work, found: Tensors) -> None:
    """Take the roundings that were learned, and install the tables that the recipe asks for."""
    config = job.recipe.temporal
    restore(maintained(job, work), found)
    if config.maintenance != "block":
        scope = config.scope if config.maintenance == "selected" else None
        features = {name: work.full[name] for name in work.block.cacheable}
        install_tables(work.block, features, work.steps, table_format=config.table, scope=scope)


def _learned(job: Job, work: Work) -> Tensors:
    """Learn the roundings of the temporal block; return them."""
    config, layers = job.recipe.temporal, maintained(job, work)
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


TEMPORAL = Where(maintained, Kept("temporal", _learned, _install))
