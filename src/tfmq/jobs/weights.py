"""The stages that settle what the codes of a layer stand for, before any is rounded: inputs that are
rescaled, rotated or put in order, a branch beside the codes, the grid of the weight.
"""

from collections.abc import Mapping
from itertools import chain, groupby
from typing import Any

import torch

from tfmq.calibration.forward import readers_of_one
from tfmq.calibration.granularity import GridErrors, candidate, candidates, measure_grids
from tfmq.calibration.rescaling import LAYER_BYTES, MOST, Reader, Seen, best_transform, observe
from tfmq.calibration.splitting import ROWS, Split, best_split, branch_of
from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors, Where
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.plan import calibrated_layers
from tfmq.nn.swap import precision
from tfmq.nn.transform import Transform
from tfmq.numerics.low_rank import LowRank


def _transforms_any(job: Job, work: Work) -> bool:
    """Whether any input may be rescaled or rotated, or any layer split."""
    return any(scheme.transforms or scheme.rank for scheme in work.plan.layers.values())


def _transform(job: Job, work: Work, found: Tensors) -> None:
    """Rescale, rotate or order the inputs of layers, and put branches beside their codes, as was found."""
    for name, layer in calibrated_layers(job.denoiser.module).items():
        ranges = work.plan.layers[name].weight.ranges
        if parts := {part: found[f"{name}.{part}"] for part in TRANSFORMS if f"{name}.{part}" in found}:
            layer.transform(_joined(parts), ranges=ranges)
        if f"{name}.up" in found:
            factors = LowRank(found[f"{name}.up"], found[f"{name}.down"])
            layer.split(branch_of(layer, factors, job.recipe.branch.dtype), ranges=ranges)


# What the journal keeps of a layer's transform.
TRANSFORMS = ("factor", "rotated", "order", "segments")


def _parted(transform: Transform) -> Tensors:
    """Return a transform as tensors, without what it has not."""
    found = {"factor": transform.factor, "order": transform.order}
    if transform.rotated:
        found["rotated"] = torch.tensor(transform.rotated)
    if transform.segments:
        found["segments"] = torch.tensor(transform.segments)
    return {name: part for name, part in found.items() if part is not None}


def _joined(parts: Tensors) -> Transform:
    """Undo `_parted`."""
    segments = tuple(parts["segments"].tolist()) if "segments" in parts else ()
    return Transform(parts.get("factor"), int(parts.get("rotated", 0)), parts.get("order"), segments)


def _splits(work: Work) -> bool:
    """Whether any layer may have a branch."""
    return any(layer.rank for layer in work.plan.layers.values())


def _transforms(job: Job, work: Work) -> Tensors:
    """Return the transforms of inputs, and both factors of branches."""
    module, store, schemes = job.denoiser.module, job.store, work.plan.layers
    layers = {
        name: layer
        for name, layer in calibrated_layers(module).items()
        if schemes[name].transforms or schemes[name].rank
    }
    together = _together(job, work, layers)
    groups = job.in_groups(together, LAYER_BYTES * max(map(len, together), default=1))
    found: Tensors = {}
    with job.progress("calibration: rescaling", len(groups) * len(store) + len(layers)) as advance:
        for group in groups:
            chosen = {name: layers[name] for name in chain.from_iterable(group)}
            with precision(module, weights="full", inputs="full"):
                seen = observe(
                    job.denoiser,
                    chosen,
                    work.steps,
                    store,
                    rotations={name: schemes[name].rotation for name in chosen},
                    advance=advance,
                    most=ROWS if _splits(work) else MOST,
                )
            for names in group:
                found |= _best(job, work, {name: layers[name] for name in names if name in seen}, seen)
            advance(len(chosen))
    return found


def _together(job: Job, work: Work, layers: Mapping[str, CalibratedLayer]) -> list[list[str]]:
    """Return `layers` in lists that have one transform: those that read tokens of the same tensor, of the
    same segments, with the same to choose from. A layer that may have a branch has a transform of its own,
    which is chosen with the branch.
    """
    schemes = work.plan.layers

    def alike(name: str) -> tuple[Any, ...]:
        scheme = schemes[name]
        return tuple(layers[name].grid.segments), scheme.equalizers, scheme.rotation, scheme.clusters

    shared = {
        name: layer for name, layer in layers.items() if layer.operation.by_token and not schemes[name].rank
    }
    alone = [[name] for name in layers if name not in shared]
    with precision(job.denoiser.module, weights="full", inputs="full"):
        lists = readers_of_one(shared, lambda: job.denoiser(next(iter(job.store)).rows(0, 1)))
    parted = (list(names) for together in lists for _, names in groupby(together, alike))
    return [*parted, *alone]


def _best(job: Job, work: Work, layers: Mapping[str, CalibratedLayer], seen: Mapping[str, Seen]) -> Tensors:
    """Return the best transforms and branches of layers that read the same tensor."""
    found: Tensors = {}
    readers = {
        name: Reader(layer, seen[name], work.plan.layers[name].weight.ranges)
        for name, layer in layers.items()
    }
    if not readers:
        return found
    kept = _chosen(job, work, readers)
    transform, factors = kept.transform, kept.factors
    for name in readers:
        found |= {f"{name}.{part}": value for part, value in _parted(transform).items()}
        if factors is not None:
            found |= {f"{name}.up": factors.up.contiguous(), f"{name}.down": factors.down.contiguous()}
    return found


def _chosen(job: Job, work: Work, readers: Mapping[str, Reader]) -> Split:
    """Return what becomes of layers that read the same tensor; a layer that may have a branch is alone."""
    branch, (name, reader) = job.recipe.branch, next(iter(readers.items()))
    scheme = work.plan.layers[name]
    split = best_split(
        reader,
        equalizers=scheme.equalizers,
        clusters=scheme.clusters,
        splitters=branch.splitters,
        rank=scheme.rank,
        dtype=branch.dtype,
    )
    if split is not None:
        return split
    every = [*readers.values()]
    return Split(best_transform(every, equalizers=scheme.equalizers, clusters=scheme.clusters))


def _undecided(job: Job, work: Work) -> dict[str, CalibratedLayer]:
    """Return the layers for whose weights the recipe has more than one grid or group."""
    layers = calibrated_layers(job.denoiser.module)
    return {name: layer for name, layer in layers.items() if work.plan.layers[name].weight.choices}


def _choose_grids(job: Job, work: Work, found: Tensors) -> None:
    """Give each weight the best of its grids and groups."""
    for name, layer in _undecided(job, work).items():
        scheme, work.grids[name] = work.plan.layers[name].weight, GridErrors.of(found[name])
        if kept := work.grids[name].kept:
            layer.regrid(candidate(layer, *scheme.choices[kept], ranges=scheme.ranges))


def _grid_errors(job: Job, work: Work) -> Tensors:
    """Return errors and bits of the candidates of each layer, `[2, n]`."""
    layers = _undecided(job, work)
    schemes = {name: work.plan.layers[name].weight for name in layers}
    most = max(len(schemes[name].choices) * layer.weight.numel() for name, layer in layers.items())
    groups = job.in_groups(list(layers), 4 * most)
    found: Tensors = {}
    with job.progress(
        "calibration: grids of weights", len(groups) * (len(job.store) // job.recipe.calibration.interval)
    ) as advance:
        for group in groups:
            chosen = {name: layers[name] for name in group}
            grids = {
                name: candidates(layer, schemes[name].choices, ranges=schemes[name].ranges)
                for name, layer in chosen.items()
            }
            measured = measure_grids(job.denoiser, chosen, grids, job.batches, advance=advance)
            found |= {name: errors.tensor() for name, errors in measured.items()}
    return found


RESCALING = Where(_transforms_any, Kept("rescaling", _transforms, _transform))
GRIDS = Where(_undecided, Kept("grids", _grid_errors, _choose_grids))
