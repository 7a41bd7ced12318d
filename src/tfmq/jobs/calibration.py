"""The stages that look at the full-precision model: its calls, the ranges of activations, static or dynamic
inputs.
"""

from collections.abc import Mapping

import torch

from tfmq.calibration.choice import InputErrors, keep_better, measure_inputs
from tfmq.calibration.ranges import FEWEST_VALUES, SITE_BYTES, SiteStatistics, collect, fit_site
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import recorded_calls, recorded_networks
from tfmq.calibration.variety import warn_of_single_values
from tfmq.jobs.forecast import calibration_seconds, check_room, check_time
from tfmq.jobs.job import Job, Work
from tfmq.jobs.judging import judged
from tfmq.jobs.stage import Kept, Tensors, Where, nothing
from tfmq.models.denoiser import Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import activation_sites, calibrated_embeddings, calibrated_layers
from tfmq.nn.scheme import RangeMethod
from tfmq.nn.swap import precision
from tfmq.progress import Advance
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.reconstruction.unit import settle

# Joins the name of a quantizer and that of a tensor of its grid over the exact extremes.
EXACT = ".exact."


def record_batch(
    job: Job, store: CalibrationStore, indices: range, *, advance: Advance = lambda amount=1: None
) -> None:
    """Run the sampler in full precision for the images `indices`, and keep every denoiser call in `store`,
    those of other networks in stores within it.
    """

    def sink(inputs: Inputs) -> None:
        store.append(inputs)
        advance()

    # A worker comes here without the stages before. For a weight that could have a gradient torch may take
    # another kernel, which rounds otherwise.
    job.denoiser.module.requires_grad_(False).eval()
    with recorded_calls(job.denoiser, sink), recorded_networks(job.networks, store):
        job.sampler.run(indices, steps=job.recipe.calibration.steps, seed=job.seed_of("calibration"))


def _recorded(job: Job, work: Work) -> Tensors:
    """Run the sampler in full precision and store every denoiser call; return how many there are. Warn of
    classes and the like that are one and the same in all of them.
    """
    check_time(job, work)
    check_room(job)
    if job.foretold is not None:
        job.foretold(calibration_seconds(job, work), "calibration")
    job.store.clear()
    _record(job, work)
    return {"calls": torch.tensor(len(job.store))}


def _record(job: Job, work: Work) -> None:
    config, store = job.recipe.calibration, job.store
    batches = [
        range(start, min(start + config.batch_size, config.samples))
        for start in range(0, config.samples, config.batch_size)
    ]
    with job.progress("calibration: sampling", len(batches) * config.steps) as advance:
        if job.helpers is None:
            for indices in batches:
                record_batch(job, store, indices, advance=advance)
        else:
            for _ in job.helpers.record(batches):
                advance(config.steps)
            store.adopt(range(len(batches)))
    warn_of_single_values(job.denoiser, job.sampler.example(), work.block.trace, store, batches)


def _take_ranges(job: Job, work: Work, ranges: Tensors) -> None:
    """Give every activation quantizer its ranges."""
    sites = activation_sites(job.denoiser.module)
    for name, quantizer in sites.items():
        quantizer.fit(ranges[f"{name}.scale"], ranges[f"{name}.zero_point"])
    together = {name: int(ranges[f"{name}.together"]) for name in sites}
    work.pooled = {name: steps for name, steps in together.items() if steps > 1}
    work.exact = {name.replace(EXACT, "."): tensor for name, tensor in ranges.items() if EXACT in name}


def _fitted_ranges(job: Job, work: Work) -> Tensors:
    """Fit every activation quantizer on the full-precision trajectory; return the fitted tensors and, where
    the plainest candidate will be judged, as `EXACT` ones those of grids over the exact extremes.
    """
    module, store = job.denoiser.module, job.store
    sites = activation_sites(module)
    if not sites:
        return {}
    groups = job.in_groups(list(sites), SITE_BYTES)
    found: Tensors = {}
    # Each has a bar of its own: a call of a large model takes a thousand times as long as a search.
    with precision(module, weights="full", inputs="quantized"):
        for group in groups:
            seen = {name: sites[name] for name in group}
            others = [quantizer for name, quantizer in sites.items() if name not in seen]
            with job.progress("calibration: values of activations", len(store)) as advance:
                statistics = collect(
                    job.denoiser, seen, work.steps, store, calls=len(store), advance=advance, passing=others
                )
            with job.progress("calibration: activation ranges", len(seen)) as advance:
                found |= _fit_sites(job, work, seen, statistics, advance)
    return found


def _fit_sites(
    job: Job,
    work: Work,
    sites: Mapping[str, ActivationQuantizer],
    statistics: Mapping[str, SiteStatistics],
    advance: Advance,
) -> Tensors:
    """Fit the quantizers and return their tensors, and how many timesteps at most each had to take together;
    one that no call has reached stays as it is.
    """
    found: Tensors = {}
    # What the plan says comes last, and stays.
    exact: dict[str, RangeMethod] = {EXACT: "min_max"} if judged(job) else {}
    layers, products = work.plan.layers, work.plan.products
    plans = {f"{name}.input_quantizer": layer.input for name, layer in layers.items() if layer.input}
    plans |= {owner: quantizer for owner, (_, quantizer) in products.items() if quantizer}
    for name, site in sites.items():
        plan = plans.get(name) or plans[name.rpartition(".tfmq_products")[0]]
        for mark, method in {**exact, ".": plan.ranges}.items():
            together = (
                fit_site(
                    site,
                    statistics[name],
                    method=method,
                    shared=plan.zero_points(name),
                    measured=plan.key == "measured",
                    fewest=0 if plan.finite else FEWEST_VALUES,
                )
                if name in statistics
                else 1
            )
            state = {**site.state_dict(), "together": torch.tensor(together)}
            found |= {f"{name}{mark}{key}": value.clone() for key, value in state.items()}
        advance()
    return found


def _undecided(job: Job, work: Work) -> dict[str, CalibratedLayer]:
    """Return the layers whose input grids are static or dynamic by a measurement."""
    layers = calibrated_layers(job.denoiser.module)
    return {name: layer for name, layer in layers.items() if work.plan.measures(name)}


def _input_errors(job: Job, work: Work) -> Tensors:
    """Return the errors of static and dynamic input grids, float64 `[2]` for each layer."""
    with job.progress(
        "calibration: static or dynamic inputs", len(job.store) // job.recipe.calibration.interval
    ) as advance:
        found = measure_inputs(job.denoiser, _undecided(job, work), job.batches, advance=advance)
    return {
        name: torch.tensor([errors.static, errors.dynamic], dtype=torch.float64)
        for name, errors in found.items()
    }


def _choose_inputs(job: Job, work: Work, errors: Tensors) -> None:
    """Let each layer keep the better of static and dynamic grids."""
    layers = _undecided(job, work)
    work.inputs = {name: InputErrors(*errors[name].tolist()) for name in layers}
    keep_better(layers, work.inputs)


def settle_embeddings(job: Job, work: Work) -> None:
    """Let embeddings compute with their codes before anything learns, so that what learns makes up for it."""
    for embedding in calibrated_embeddings(job.denoiser.module).values():
        settle(embedding)


CALLS = Kept("calibration", _recorded, nothing)
RANGES = Kept("activations", _fitted_ranges, _take_ranges)
INPUTS = Where(_undecided, Kept("inputs", _input_errors, _choose_inputs))
