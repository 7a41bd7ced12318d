"""The stages of networks without a timestep, such as a decoder or a text encoder, which the trajectory of the
denoiser reaches: which of their layers stay in floating point.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from tfmq.calibration.spared import Spared, full_outputs, layer_errors, network_error, spare
from tfmq.calibration.store import CalibrationStore
from tfmq.calibration.trajectory import held_out
from tfmq.jobs.job import Job, Work
from tfmq.jobs.stage import Kept, Tensors
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.plan import activation_sites, calibrated_layers
from tfmq.nn.products import ProductQuantizers
from tfmq.nn.submodules import submodules
from tfmq.nn.swap import replace_module


@dataclass
class Recorded:
    """A network with its recorded calls as a sampler: image `i` is the output for the sample `i`.

    Attributes:
        denoiser: the network.
        store: its calls, a sample each.
    """

    denoiser: Denoiser
    store: CalibrationStore

    @torch.no_grad()
    def run(self, indices: range, *, steps: int, seed: int) -> Tensor:
        """Return the outputs for the samples `indices`, `[N, ...]`; nothing is drawn, so `steps` and `seed`
        are of no effect.
        """
        return torch.cat([self.denoiser(self.store.read(index)) for index in indices])

    def example(self) -> Inputs:
        """Return the first sample."""
        return self.store.read(0)

    def describe(self) -> dict[str, Any]:
        """Return how many samples there are: what they are made of is the job's own."""
        return {"samples": len(self.store)}


def keep_stock(job: Job, work: Work) -> None:
    """Keep the layers as they are, where the recipe may leave some so."""
    if job.recipe.tolerance.measures:
        work.stock = {name: job.denoiser.module.get_submodule(name) for name in work.plan.layers}


def spare_layers(job: Job, work: Work) -> None:
    """Leave layers in full precision, or their inputs, until the errors on held-out calls are within the
    recipe's bounds.
    """
    if job.recipe.tolerance.measures:
        # Measuring leaves out some of the candidates, so they are named before.
        Kept("spared", _measured, partial(_spare, _candidates(job)))(job, work)


def _spare(names: Sequence[str], job: Job, work: Work, found: Tensors) -> None:
    """Leave what was found among the candidates of these `names`."""
    errors = dict(zip(names, found["errors"].tolist(), strict=True))
    spared = tuple(name for name, one in zip(names, found["spared"].tolist(), strict=True) if one)
    before, after = found["output"].tolist()
    work.spared = Spared(errors, spared, before, after, job.recipe.tolerance.instead)
    # Where the measurement ran just now, it has taken some out already.
    left = _candidates(job)
    _leave(job, work, [name for name in spared if name in left])
    work.stock = {}


def _measured(job: Job, work: Work) -> Tensors:
    """Return the errors of the candidates, which of them are spared, and the errors of the output."""
    tolerance, batches = job.recipe.tolerance, held_out(job.store)
    layers, full = calibrated_layers(job.denoiser.module), full_outputs(job.denoiser, batches)

    def measure(names: Sequence[str]) -> float:
        _leave(job, work, names)
        return network_error(job.denoiser, batches, full)

    # Products have no weights: what they do is seen in the output of the network alone.
    errors = layer_errors(job.denoiser, layers, batches) | {
        name: network_error(job.denoiser, batches, full, part) for name, part in _products(job).items()
    }
    layer, output = (inf if bound is None else bound for bound in (tolerance.layer, tolerance.output))
    found = spare(errors, layer=layer, output=output, measure=measure)
    return {
        "errors": torch.tensor([*errors.values()], dtype=torch.float64),
        "spared": torch.tensor([name in found.names for name in errors]),
        "output": torch.tensor([found.before, found.after], dtype=torch.float64),
    }


def _products(job: Job) -> dict[str, ProductQuantizers]:
    """Return the quantizers of attention products by the module that owns them."""
    found = submodules(job.denoiser.module, ProductQuantizers)
    return {name.rpartition(".")[0]: part for name, part in found.items() if activation_sites(part)}


def _candidates(job: Job) -> list[str]:
    """Return the names of all that may be spared: layers, and owners of attention products."""
    return [*calibrated_layers(job.denoiser.module), *_products(job)]


def _leave(job: Job, work: Work, names: Sequence[str]) -> None:
    """Let layers compute in full precision, or read their input so, as the recipe has it; products do."""
    module = job.denoiser.module
    layers, products = dict(work.plan.layers), _products(job)
    for name in names:
        if name in products:
            products[name].spare()
        elif job.recipe.tolerance.instead == "weights":
            layers[name] = replace(layers[name], input=None)
            calibrated_layers(module)[name].input_quantizer = None
        else:
            del layers[name]
            replace_module(module, name, work.stock[name])
    work.plan = replace(work.plan, layers=layers)
    if not layers:
        raise ValueError(
            f"no layer of this {type(module).__name__} can be quantized within the tolerance of the recipe"
        )
