"""Choose how the inputs of layers are rescaled: equalizers propose, and the error of the layer's output on
what it has read decides.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tfmq.calibration.forward import watched
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.equivalence import EQUALIZERS, Extremes, by_row, columns, power_of_two
from tfmq.numerics.ranges import from_range
from tfmq.numerics.segments import spread
from tfmq.progress import Advance
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext
from tfmq.quantizers.weight import fit_grid

# Values of a layer's inputs that are kept, and the fewest and most rows that these make.
KEPT = 2**19
FEWEST, MOST = 16, 256
# Bytes that one layer takes while it is looked at, about: what is kept, and the same a few times while
# candidates are compared.
LAYER_BYTES = 4 * KEPT * 4
# Share of the error that a rescaling has to take away: what it does costs a multiplication at every call.
WORTH = 0.01


@dataclass
class Seen:
    """What a layer has read: extremes of every channel `[S, C]`, and rows `[groups, R, n]` as its weight
    reads them, with the step of each.
    """

    low: Tensor
    high: Tensor
    rows: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    @classmethod
    def nothing(cls, layer: CalibratedLayer, steps: int) -> "Seen":
        """Return what a layer has read before it ran."""
        channels = layer.weight.shape[1] * layer.operation.groups
        return cls(torch.zeros(steps, channels), torch.zeros(steps, channels))

    def update(self, layer: CalibratedLayer, x: Tensor, output: Tensor, bins: Tensor, *, most: int) -> None:
        """Take note of an input at the steps `bins` `[B or 1]`; at most `most` rows of it are kept."""
        steps = bins.cpu().repeat_interleave(len(x) // len(bins))
        channels = x.movedim(layer.operation.channel_axis, 1).reshape(len(x), self.low.shape[1], -1).float()
        index = steps[:, None].expand(-1, channels.shape[1])
        self.low.scatter_reduce_(0, index, channels.amin(dim=2).cpu(), "amin")
        self.high.scatter_reduce_(0, index, channels.amax(dim=2).cpu(), "amax")
        samples = torch.arange(min(len(x), most)) * len(x) // min(len(x), most)
        available = layer.operation.places(output)
        each = min(available, most // len(samples))
        # Other places at each call, so that all of them have their turn.
        places = (torch.arange(each) * available // each + 7 * len(self.rows)) % available
        self.rows.append(layer.operation.inputs_at(x[samples], layer.weight.shape[2:], places).float().cpu())
        self.steps.append(steps[samples].repeat_interleave(each))


@contextmanager
def observed(
    layers: Mapping[str, CalibratedLayer], steps: StepContext, calls: int
) -> Iterator[dict[str, Seen]]:
    """Note what `layers` read in the next `calls` calls of the denoiser."""
    seen = {name: Seen.nothing(layer, len(steps.timesteps)) for name, layer in layers.items()}

    def note(name: str, x: Tensor, output: Tensor) -> None:
        rows = min(MOST, max(FEWEST, KEPT // layers[name].weight[0].numel()))
        seen[name].update(layers[name], x, output, steps.index, most=max(1, rows // calls))

    with watched(layers, note):
        yield seen


@torch.no_grad()
def observe(
    denoiser: Denoiser,
    layers: Mapping[str, CalibratedLayer],
    steps: StepContext,
    batches: Iterable[Inputs],
    *,
    calls: int,
    advance: Advance,
) -> dict[str, Seen]:
    """Run the full-precision `denoiser` over `batches`, `calls` of them, and return what `layers` read; a
    layer that none reaches is left out.
    """
    with observed(layers, steps, calls) as seen:
        for inputs in batches:
            denoiser(inputs)
            advance()
    return {name: found for name, found in seen.items() if found.rows}


def _entered(layer: CalibratedLayer, seen: Seen, rows: Tensor, steps: Tensor, factor: Tensor) -> Tensor:
    """Return rescaled `rows` `[groups, R, n]` as they come out of the layer's quantizer, on grids over exact
    extremes.
    """
    quantizer = layer.input_quantizer
    if quantizer is None:
        return rows
    if not isinstance(quantizer, ActivationQuantizer):
        # A grid for each token, which is a row.
        return quantizer(rows)
    low, high = seen.low * factor, seen.high * factor
    if not quantizer.per_step:
        low, high, steps = (
            low.amin(dim=0, keepdim=True),
            high.amax(dim=0, keepdim=True),
            torch.zeros_like(steps),
        )
    widths = quantizer.segments or (len(factor),)
    grids = [
        from_range(below.amin(dim=1), above.amax(dim=1), quantizer.format)
        for below, above in zip(low.split(widths, dim=1), high.split(widths, dim=1), strict=True)
    ]
    scale, zero = (
        spread(torch.stack(column, dim=1), widths, axis=1)[steps] for column in zip(*grids, strict=True)
    )
    taps = rows.shape[2] * layer.operation.groups // len(factor)
    scale, zero = (
        value.unflatten(1, (layer.operation.groups, -1)).transpose(0, 1).repeat_interleave(taps, dim=2)
        for value in (scale, zero)
    )
    return fake_quantize(rows, scale, zero, quantizer.format.levels)


def output_error(layer: CalibratedLayer, seen: Seen, factor: Tensor, *, ranges: str) -> float:
    """Return the squared error of a layer's output on what it has read, with its inputs rescaled, quantized,
    and nearest codes of its weight.
    """
    groups = layer.operation.groups
    exact, rows = layer.weight.float().cpu(), torch.cat(seen.rows, dim=1)
    weight = exact / by_row(factor, exact, groups)
    grid = fit_grid(weight, layer.grid.format, segments=layer.grid.segments, method=ranges)
    taps = rows.shape[2] * groups // len(factor)
    scaled = rows * factor.reshape(groups, 1, -1).repeat_interleave(taps, dim=2)
    entered = _entered(layer, seen, scaled, torch.cat(seen.steps), factor)
    rounded = grid.decode(grid.encode(weight))
    full, found = (w.flatten(1).unflatten(0, (groups, -1)).mT for w in (exact, rounded))
    return float((entered @ found - rows @ full).double().square().sum())


def best_factor(
    layer: CalibratedLayer, seen: Seen, *, equalizers: Iterable[str], ranges: str
) -> Tensor | None:
    """Return the factor `[C_in]` that leaves the least error; None where no rescaling takes away `WORTH` of
    it.
    """
    weights = columns(layer.weight.float().cpu(), layer.operation.groups)
    extremes = Extremes(seen.low, seen.high)
    one = torch.ones_like(weights)
    least, kept = (1 - WORTH) * output_error(layer, seen, one, ranges=ranges), None
    for name in equalizers:
        for proposed in EQUALIZERS[name](extremes, weights):
            factor = power_of_two(proposed)
            if torch.equal(factor, one):
                continue
            error = output_error(layer, seen, factor, ranges=ranges)
            if error < least:
                least, kept = error, factor
    return kept
