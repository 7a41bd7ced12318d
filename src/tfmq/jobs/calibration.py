"""The stages that look at the full-precision model: its calls, the ranges of activations, static or dynamic
inputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tfmq.calibration.choice import InputErrors, keep_better, measure_inputs
from tfmq.calibration.ranges import SITE_BYTES, collect, fit_site
from tfmq.calibration.rescaling import LAYER_BYTES, best_factor, observe
from tfmq.calibration.trajectory import recorded_calls
from tfmq.calibration.variety import warn_of_single_values
from tfmq.jobs.forecast import calibration_seconds, check_room, check_time
from tfmq.jobs.job import Job, Work
from tfmq.models.denoiser import Inputs
from tfmq.nn.plan import activation_sites, calibrated_embeddings, calibrated_layers
from tfmq.nn.swap import precision
from tfmq.reconstruction.unit import settle


def record_batch(job: Job, sink: Callable[[Inputs], None], indices: range) -> None:
    """Run the sampler in full precision for the images `indices`, and hand every denoiser call to `sink`."""
    with recorded_calls(job.denoiser, sink):
        job.sampler.run(indices, steps=job.recipe.calibration.steps, seed=job.seed_of("calibration"))


def record_calls(job: Job, work: Work) -> None:
    """Run the sampler in full precision and store every denoiser call; warn of classes and the like that are
    one and the same in all of them.
    """

    def compute() -> dict[str, Tensor]:
        check_time(job, work)
        check_room(job)
        if job.foretold is not None:
            job.foretold(calibration_seconds(job, work), "calibration")
        job.store.clear()
        _record(job, work)
        return {"calls": torch.tensor(len(job.store))}

    job.journal.stage("calibration", compute)


def _record(job: Job, work: Work) -> None:
    config, store = job.recipe.calibration, job.store
    batches = [
        range(start, min(start + config.batch_size, config.samples))
        for start in range(0, config.samples, config.batch_size)
    ]
    with job.progress("calibration: sampling", len(batches) * config.steps) as advance:

        def sink(inputs: Inputs) -> None:
            store.append(inputs)
            advance()

        if job.helpers is None:
            for indices in batches:
                record_batch(job, sink, indices)
        else:
            for _ in job.helpers.record(batches):
                advance(config.steps)
            store.adopt(range(len(batches)))
    warn_of_single_values(job.denoiser, job.sampler.example(), work.block.trace, store, batches)


def rescale_layers(job: Job, work: Work) -> None:
    """Let equalizers choose how inputs outside of the temporal block are rescaled, where the recipe has
    any.
    """
    if not job.recipe.rescaling.equalizers:
        return
    factors = job.journal.stage("rescaling", lambda: _factors(job, work))
    layers = calibrated_layers(job.denoiser.module)
    for name, factor in factors.items():
        layers[name].rescale(factor, ranges=work.plan.layers[name].ranges)


def _factors(job: Job, work: Work) -> dict[str, Tensor]:
    """Return the factors of the layers that are rescaled. The trajectory is run again for each group of
    layers that fits the memory.
    """
    temporal = {layer.name for layer in work.block.trace.temporal}
    layers = {
        name: layer for name, layer in calibrated_layers(job.denoiser.module).items() if name not in temporal
    }
    names, size = list(layers), job.resources.sites_at_once(LAYER_BYTES) or len(layers)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    found: dict[str, Tensor] = {}
    with job.progress("calibration: rescaling", len(groups) * len(job.store) + len(names)) as advance:
        for group in groups:
            chosen = {name: layers[name] for name in group}
            with precision(job.denoiser.module, weights="full", inputs="full"):
                seen = observe(
                    job.denoiser, chosen, work.steps, job.store, calls=len(job.store), advance=advance
                )
            for name in group:
                ranges = work.plan.layers[name].ranges
                factor = (
                    best_factor(
                        layers[name], seen[name], equalizers=job.recipe.rescaling.equalizers, ranges=ranges
                    )
                    if name in seen
                    else None
                )
                if factor is not None:
                    found[name] = factor
                advance()
    return found


def fit_activations(job: Job, work: Work) -> None:
    """Give every activation quantizer its ranges."""
    sites = activation_sites(job.denoiser.module)
    ranges = job.journal.stage("activations", lambda: fitted_ranges(job, work))
    for name, quantizer in sites.items():
        quantizer.fit(ranges[f"{name}.scale"], ranges[f"{name}.zero_point"])


def fitted_ranges(job: Job, work: Work) -> dict[str, Tensor]:
    """Fit every activation quantizer on the full-precision trajectory; return the fitted tensors.

    The trajectory is run again for each group of quantizers that fits the memory.
    """
    module, store, layers = job.denoiser.module, job.store, work.plan.layers
    sites = activation_sites(module)
    if not sites:
        return {}
    plans = {f"{name}.input_quantizer": layer.input for name, layer in layers.items() if layer.input}
    plans |= {owner: quantizer for owner, (_, quantizer) in work.plan.products.items() if quantizer}
    names, size = list(sites), job.resources.sites_at_once(SITE_BYTES) or len(sites)
    groups = [names[start : start + size] for start in range(0, len(names), size)]
    amount = len(groups) * len(store) + len(sites)
    with (
        job.progress("calibration: activation ranges", amount) as advance,
        precision(module, weights="full", inputs="quantized"),
    ):
        for group in groups:
            seen = {name: sites[name] for name in group}
            others = [quantizer for name, quantizer in sites.items() if name not in seen]
            statistics = collect(
                job.denoiser, seen, work.steps, store, calls=len(store), advance=advance, passing=others
            )
            for name in group:
                if name in statistics:
                    chosen = plans.get(name) or plans[name.rpartition(".tfmq_products")[0]]
                    fit_site(
                        sites[name],
                        statistics[name],
                        method=chosen.ranges,  # type: ignore[arg-type]
                        shared=chosen.zero_points(name),
                        measured=chosen.per_step == "measured",
                    )
                advance()
    return {
        f"{name}.{key}": value
        for name, quantizer in sites.items()
        for key, value in quantizer.state_dict().items()
    }


def choose_inputs(job: Job, work: Work) -> None:
    """Measure static and dynamic input grids where the plan says so, and let each layer keep the better
    ones.
    """
    layers = {
        name: layer
        for name, layer in calibrated_layers(job.denoiser.module).items()
        if work.plan.measures(name)
    }
    if not layers:
        return

    def compute() -> dict[str, Tensor]:
        with job.progress(
            "calibration: static or dynamic inputs", len(job.store) // job.recipe.calibration.interval
        ) as advance:
            found = measure_inputs(job.denoiser, layers, job.batches, advance=advance)
        return {
            name: torch.tensor([errors.static, errors.dynamic], dtype=torch.float64)
            for name, errors in found.items()
        }

    tensors = job.journal.stage("inputs", compute)
    work.inputs = {name: InputErrors(*tensors[name].tolist()) for name in layers}
    keep_better(layers, work.inputs)


def settle_embeddings(job: Job, work: Work) -> None:
    """Let embeddings compute with their codes before anything learns, so that what learns makes up for it."""
    for embedding in calibrated_embeddings(job.denoiser.module).values():
        settle(embedding)
