"""Which layers of a network stay in floating point, or keep their input so, for the sake of its output:
measured on calls that no grid was fitted on.

An outlier channel of an activation leaves the others few codes of a grid for the whole tensor. The layer that
reads it has a large error then, which its own output shows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.calibration.energies import Parts, layer_energies
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import precision
from tfmq.quantizers.part import Part, Precision


@dataclass(frozen=True)
class Spared:
    """What was measured: the error of each layer's output, which layers are spared, and the error of the
    network's output before any was and after. Errors are energies over that of the output. What is `instead`
    of a spared layer is one in floating point (`float`), or one whose input is (`weights`).
    """

    errors: Mapping[str, float]
    names: tuple[str, ...]
    before: float
    after: float
    instead: str = "float"


def _parts(layer: CalibratedLayer) -> Parts:
    """Return what gives the output and its error."""
    weight = layer.quantized_weight()

    def parts(x: Tensor) -> list[Tensor]:
        x = layer.transformed(x)
        read = x if layer.input_quantizer is None else layer.input_quantizer(x)
        exact = layer.operation(x, layer.weight, None)
        error = layer.operation(read, weight.to(x.dtype), None) - exact
        if layer.branch is None:
            return [exact, error]
        beside = layer.branch(x)
        return [exact + beside, error + layer.branch(read) - beside if layer.branch.shared else error]

    return parts


def layer_errors(
    denoiser: Denoiser, layers: Mapping[str, CalibratedLayer], batches: Iterable[Inputs]
) -> dict[str, float]:
    """Run the full-precision network over `batches` and return the error that quantization makes in the
    output of each of `layers`; 0 where no call reaches it.
    """
    energies = layer_energies(denoiser, layers, _parts, batches, count=2)
    return {name: _ratio(row) for name, row in energies.items()}


@torch.no_grad()
def full_outputs(denoiser: Denoiser, batches: Iterable[Inputs]) -> list[Tensor]:
    """Return the outputs of the network in full precision."""
    with precision(denoiser.module, weights="full", inputs="full"):
        return [denoiser(inputs) for inputs in batches]


@torch.no_grad()
def network_error(
    denoiser: Denoiser, batches: Iterable[Inputs], full: Sequence[Tensor], part: Part | None = None
) -> float:
    """Return the error that quantization makes in the output of the network over `batches`, or that one
    `part` of it alone makes; `full` are the outputs without it.
    """
    energies = torch.zeros(2, dtype=torch.float64)
    kind: Precision = "quantized" if part is None else "full"
    with precision(denoiser.module, weights=kind, inputs=kind), ExitStack() as stack:
        if part is not None:
            stack.callback(part.choose(weights="quantized", inputs="quantized"))
        for inputs, expected in zip(batches, full, strict=True):
            error = denoiser(inputs).double() - expected.double()
            for index, tensor in enumerate((expected.double(), error)):
                energies[index] += tensor.square().sum().cpu()
    return _ratio(energies)


def _ratio(energies: Tensor) -> float:
    """Return the energy of an error over that of the output; an error that is no number is without bound."""
    output, error = energies.tolist()
    return float(error / max(output, torch.finfo(torch.float64).tiny)) if error == error else float("inf")


def spare(
    errors: Mapping[str, float],
    *,
    layer: float,
    output: float,
    measure: Callable[[Sequence[str]], float],
    rounds: int = 8,
) -> Spared:
    """Choose which layers are spared: those whose own error is above `layer`, and then the worst of the rest,
    an equal share of them in each of at most `rounds`, until the error of the output is at most `output`.

    `measure` returns the error of the output with these layers spared, too, beside those it was asked about
    before.
    """
    order = sorted(errors, key=lambda name: (-errors[name], name))
    before = after = measure(())
    taken = sum(errors[name] > layer for name in order)
    share = -(-len(order) // rounds)
    if taken:
        after = measure(order[:taken])
    while after > output and taken < len(order):
        more = order[taken : taken + share]
        taken += len(more)
        after = measure(more)
    return Spared(errors, tuple(order[:taken]), before, after)
