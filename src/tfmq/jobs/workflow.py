"""The order of quantization, as a list of stages. Nothing else knows it."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tfmq.calibration.choice import InputErrors
from tfmq.calibration.correction import StepFit
from tfmq.calibration.granularity import Choices, GridErrors
from tfmq.calibration.ranges import FEWEST_VALUES
from tfmq.calibration.spared import Spared
from tfmq.jobs.calibration import CALLS, INPUTS, RANGES, settle_embeddings
from tfmq.jobs.correction import correct
from tfmq.jobs.job import Job, Work
from tfmq.jobs.judging import RECIPE, Known, Verdict, exchange, exchanged, judged, judging, plain, shared_copy
from tfmq.jobs.networks import Recorded, keep_stock, spare_layers
from tfmq.jobs.stage import Stage
from tfmq.jobs.temporal import TEMPORAL, maintained, settle_temporal
from tfmq.jobs.tuning import TUNING
from tfmq.jobs.units import list_units, reconstruct_units
from tfmq.jobs.weights import GRIDS, RESCALING
from tfmq.models.denoiser import Denoiser
from tfmq.nn.floating import Floating, floating
from tfmq.nn.plan import pack_all, prepare, untied
from tfmq.quantizers.steps import StepContext
from tfmq.recipes.networks import network_recipe
from tfmq.recipes.plan import make_plan
from tfmq.recipes.recipe import Recipe
from tfmq.reconstruction.tiar import full_features
from tfmq.reconstruction.tuning import TuningReport
from tfmq.reconstruction.unit import UnitReport, learned
from tfmq.storage.errors import CheckpointError
from tfmq.temporal.block import TemporalBlock
from tfmq.temporal.cache import quantized_features
from tfmq.temporal.disturbance import Disturbance, disturbance
from tfmq.temporal.probe import probe

log = logging.getLogger("tfmq")


@dataclass(frozen=True)
class Outcome:
    """What quantization did.

    By which recipe, one report a unit, the disturbance of temporal features at the calibrated timesteps,
    measured inputs, what stays in floating point, what candidates for the whole model drew, for each step
    what correction was found, of quantizers that saw few values at a timestep how many timesteps share a
    range, which layers the recipe's tolerance has spared, the number of quantized layers, measured grids of
    weights, and what tuning did.
    """

    recipe: Recipe
    units: tuple[UnitReport, ...]
    disturbance: Disturbance
    inputs: Mapping[str, InputErrors] = field(default_factory=dict)
    floating: tuple[Floating, ...] = ()
    verdict: Verdict | None = None
    correction: tuple[StepFit, ...] = ()
    pooled: Mapping[str, int] = field(default_factory=dict)
    spared: Spared | None = None
    layers: int = 0
    grids: Mapping[str, tuple[Choices, GridErrors]] = field(default_factory=dict)
    tuning: TuningReport | None = None


def swap_layers(job: Job, work: Work) -> None:
    """Put calibrated layers in the place of the model's own, with a grid for every recorded timestep."""
    denoiser = job.denoiser
    device = next(denoiser.module.parameters()).device
    work.steps = StepContext(job.store.timesteps()).to(device)
    prepare(denoiser.module, work.plan, work.steps, timestep=denoiser.timestep)
    work.full = full_features(work.block, work.steps.timesteps, work.block.features)


# All that gives the model its quantized form and its grids, once every call is recorded.
LAYING_OUT: tuple[Stage, ...] = (
    keep_stock,
    swap_layers,
    RESCALING,
    GRIDS,
    RANGES,
    INPUTS,
    settle_embeddings,
    settle_temporal,
    TEMPORAL,
    spare_layers,
)
# What a helper does as well, or reads back, before it takes its units.
BEFORE_UNITS: tuple[Stage, ...] = (CALLS, *LAYING_OUT, list_units)
STAGES: tuple[Stage, ...] = (*BEFORE_UNITS, reconstruct_units, TUNING)
# A network that the trajectory of a denoiser reaches has its calls from there.
RECORDED: tuple[Stage, ...] = tuple(stage for stage in STAGES if stage is not CALLS)


def run(job: Job, stages: tuple[Stage, ...] = STAGES, block: TemporalBlock | None = None) -> Work:
    """Take a job's model through `stages`; afterwards it has calibrated layers.

    `block` is what probing the model gives, where that was done before.

    Raises:
        CalibrationError: NaN or infinite values.
        ValueError: the model cannot be quantized within the job's resources.
    """
    job.resources.prepare()
    job.denoiser.module.requires_grad_(False).eval()
    block = block or probe(job.denoiser, job.sampler.example())
    plan = untied(make_plan(job.recipe, block.trace), job.denoiser.module)
    work = Work(block=block, plan=plan)
    for stage in stages:
        stage(job, work)
    return work


def quantize_denoiser(job: Job) -> Outcome:
    """Quantize the job's denoiser in place; afterwards it holds packed layers only."""
    outcome = _quantized(job)
    if outcome.pooled:
        log.info(
            "%d inputs saw fewer than %d values at a timestep: their ranges "
            "are those of up to %d timesteps together; more calibration images would tell these apart",
            len(outcome.pooled),
            FEWEST_VALUES,
            max(outcome.pooled.values()),
        )
    return outcome


def _quantized(job: Job) -> Outcome:
    module, count = job.denoiser.module, judged(job)
    if not count and not job.recipe.correction.estimators:
        return _packed(job, run(job))
    full, other = shared_copy(module), shared_copy(module)
    work = run(job)
    known = {"temporal": learned(maintained(job, work))}
    if work.grids:
        known["grids"] = {name: errors.tensor() for name, errors in work.grids.items()}
    if work.exact and not any(layer.transforms for layer in work.plan.layers.values()):
        known["activations"] = dict(work.exact)
    found = _packed(job, work)
    found = replace(found, correction=correct(job, work, full))
    if not count:
        return found
    with exchanged(module, other):
        # The recorded calls are there, temporal layers are what they are, and ranges too unless inputs were
        # rescaled; the rest is found again in less time than it takes to keep.
        simple = replace(job, recipe=plain(job.recipe), journal=Known(known))
        simplest = _packed(simple, run(simple, LAYING_OUT, work.block))
    verdict = judging(full, other, count)(job, work)
    if verdict.kept == RECIPE:
        return replace(found, verdict=verdict)
    exchange(module, other)
    return replace(simplest, verdict=verdict)


def _packed(job: Job, work: Work) -> Outcome:
    """Pack the job's model and return what was done."""
    module = job.denoiser.module
    pack_all(module)
    features = quantized_features(work.block, work.steps, work.block.features)
    disturbed = disturbance(work.steps.timesteps, work.full, features)
    kept_float = floating(module, work.block.trace.quantizable)
    return Outcome(
        job.recipe,
        work.reports,
        disturbed,
        work.inputs,
        kept_float,
        pooled=work.pooled,
        spared=work.spared,
        layers=len(work.plan.layers),
        tuning=work.tuning,
        grids={name: (work.plan.layers[name].weight.choices, errors) for name, errors in work.grids.items()},
    )


def quantize_networks(job: Job) -> dict[str, Outcome | str]:
    """Quantize the further networks of a job whose denoiser is done, in place, one after the other.

    Returns:
        What was done to each, or why it stays as it was.
    """
    return {name: _quantized_network(job, name, network) for name, network in job.networks.items()}


def _quantized_network(job: Job, name: str, network: Denoiser) -> Outcome | str:
    store = job.store.of(name)
    if not len(store):
        return "the pipeline made no call of it that can be recorded"
    sampler = Recorded(network, store)
    tokens = not sampler.example().sample.is_floating_point()
    recipe = network_recipe(job.recipe, name, tokens=tokens)
    own = job.within(name, sampler=sampler, recipe=recipe, store=store)
    before = shared_copy(network.module)
    try:
        return _packed(own, run(own, RECORDED))
    except CheckpointError:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
        # What a network of any kind may raise while it is traced and called.
        exchange(network.module, before)
        return " ".join(str(error).split()) or type(error).__name__
