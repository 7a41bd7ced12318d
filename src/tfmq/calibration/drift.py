"""How far a changed model, such as one with a LoRA, leaves the activation ranges that another was calibrated
on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.models.denoiser import Denoiser
from tfmq.nn.operation import operand
from tfmq.nn.packed_layer import PackedLayer
from tfmq.nn.submodules import named
from tfmq.nn.watch import ModuleCall, all_watched, watched
from tfmq.numerics.segments import split
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext

# Share of its range by which an input may leave that range before a warning. An 8-bit grid that grew by so
# much would lose 0.4 dB.
TOLERATED = 0.05


@dataclass(frozen=True)
class LayerDrift:
    """By how much the input of a layer goes beyond its calibrated range, in widths of that range (0.25 is a
    quarter).

    `timestep` is where that is worst, None where one range serves all.
    """

    name: str
    excess: float
    timestep: float | None


@dataclass(frozen=True)
class GridExtremes:
    """The least and the greatest value that a quantizer's input took, `[S, G]`; zero where there was none."""

    low: Tensor
    high: Tensor


def _update(seen: GridExtremes, quantizer: ActivationQuantizer, x: Tensor, bins: Tensor) -> None:
    index = (
        bins.repeat_interleave(x.shape[0] // len(bins))
        if quantizer.per_step
        else torch.zeros(x.shape[0], dtype=torch.long)
    )
    for segment, part in enumerate(split(x, quantizer.segments, axis=quantizer.axis)):
        rows = part.detach().float().flatten(1).cpu()
        seen.low[:, segment].scatter_reduce_(0, index, rows.amin(dim=1), "amin")
        seen.high[:, segment].scatter_reduce_(0, index, rows.amax(dim=1), "amax")


def static_inputs(layers: Mapping[str, PackedLayer]) -> dict[str, ActivationQuantizer]:
    """Return the static input quantizers of `layers`, by the names of these."""
    return {
        name: layer.input_quantizer
        for name, layer in layers.items()
        if isinstance(layer.input_quantizer, ActivationQuantizer)
    }


@contextmanager
def extremes(
    denoiser: Denoiser, layers: Mapping[str, PackedLayer], steps: StepContext
) -> Iterator[dict[str, GridExtremes]]:
    """Note what the `layers`, which have static grids, would read in a full-precision `denoiser`, at the
    nearest of the calibrated `steps`.
    """
    quantizers = static_inputs(layers)
    seen = {
        name: GridExtremes(torch.zeros(q.scale.shape), torch.zeros(q.scale.shape))
        for name, q in quantizers.items()
    }
    running: list[Tensor] = []

    def begin(call: ModuleCall) -> None:
        running[:] = [steps.lookup(denoiser.bind(call.args, call.kwargs).timestep)[0].cpu()]

    def note(call: ModuleCall) -> None:
        x = layers[call.name].transformed(operand(call.args, call.kwargs))
        _update(seen[call.name], quantizers[call.name], x, running[0])

    modules = named(denoiser.module, quantizers)
    with watched(denoiser.module, before=begin), all_watched(modules, before=note):
        yield seen


def drift(
    quantizers: Mapping[str, ActivationQuantizer],
    steps: StepContext,
    base: Mapping[str, GridExtremes],
    changed: Mapping[str, GridExtremes],
) -> tuple[LayerDrift, ...]:
    """Return the layers whose input in the `changed` model goes beyond the calibrated range, the furthest
    first.

    What the `base` model reaches beyond it was cut off on purpose when the range was fitted, and does not
    count.
    """
    found = []
    for name, quantizer in quantizers.items():
        scale, zero_point = quantizer.scale.cpu(), quantizer.zero_point.cpu().float()
        low, high = -zero_point * scale, (quantizer.format.levels - 1 - zero_point) * scale
        above = changed[name].high - torch.maximum(high, base[name].high)
        below = torch.minimum(low, base[name].low) - changed[name].low
        excess = (torch.maximum(above, below) / (high - low)).amax(dim=1)
        worst = int(excess.argmax())
        if excess[worst] > 0:
            timestep = float(steps.timesteps[worst]) if quantizer.per_step else None
            found.append(LayerDrift(name, float(excess[worst]), timestep))
    return tuple(sorted(found, key=lambda entry: -entry.excess))


def complaint(found: Sequence[LayerDrift]) -> str:
    """Return what to say about `found`, the furthest first, as the end of a sentence; nothing while all of it
    is tolerable.
    """
    beyond = [entry for entry in found if entry.excess > TOLERATED]
    worst = ", ".join(f"{entry.name} by {entry.excess:.0%} of its range" for entry in beyond[:3])
    return f"leaves the calibrated range of {len(beyond)} layers, furthest {worst}" if beyond else ""
