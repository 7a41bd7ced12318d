"""Choose how the inputs of layers are rescaled or rotated, and which of their channels have a grid together:
equalizers propose factors, k-means proposes clusters, and the error of the layer's output on what it has read
decides.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from tfmq.calibration.store import CalibrationStore
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.transform import Transform
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.numerics.affine import fake_quantize
from tfmq.numerics.clusters import clusters
from tfmq.numerics.equivalence import EQUALIZERS, Extremes, by_row, columns, power_of_two
from tfmq.numerics.ranges import from_range
from tfmq.numerics.rotation import largest_group, rotate
from tfmq.numerics.segments import spread
from tfmq.progress import Advance
from tfmq.quantizers.activation import ActivationQuantizer
from tfmq.quantizers.steps import StepContext

# Values of a layer's inputs that are kept, and the fewest and most rows that these make.
KEPT = 2**19
FEWEST, MOST = 16, 256
# Bytes that one layer takes while it is looked at, about: what is kept, and the same a few times while
# candidates are compared.
LAYER_BYTES = 4 * KEPT * 4
# Share of the error that a transform has to take away: what it does costs time at every call.
WORTH = 0.01
# Share that clusters have to take away more than that, 1 dB: each is a product of its own.
CLUSTERED = 0.2


@dataclass
class Seen:
    """What a layer has read: extremes of every channel `[S, C]` as they come and with groups of `group`
    channels rotated, and rows `[groups, R, n]` as its weight reads them, with the step of each. The group is
    0 where there is none.
    """

    plain: Extremes
    turned: Extremes
    group: int
    rows: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)

    @classmethod
    def nothing(cls, layer: CalibratedLayer, steps: int, rotation: int) -> "Seen":
        """Return what a layer has read before it ran; of at most `rotation` channels a group is rotated."""
        channels = layer.weight.shape[1] * layer.operation.groups
        linear = layer.operation.by_token
        group = largest_group(layer.grid.segments or [channels], rotation) if linear else 0
        plain, turned = (
            Extremes(torch.zeros(steps, channels), torch.zeros(steps, channels)) for _ in range(2)
        )
        return cls(plain, turned, group)

    def extremes(self, transform: Transform) -> Extremes:
        """Return the extremes of each channel of the input with a factor or a rotation, not in order yet."""
        if transform.rotated:
            return self.turned
        if (factor := transform.factor) is None:
            return self.plain
        return Extremes(self.plain.low * factor, self.plain.high * factor)

    def update(self, layer: CalibratedLayer, x: Tensor, output: Tensor, bins: Tensor, *, most: int) -> None:
        """Take note of an input at the steps `bins` `[B or 1]`; at most `most` rows of it are kept."""
        steps = bins.cpu().repeat_interleave(len(x) // len(bins))
        _widen(self.plain, steps, x, layer.operation.channel_axis)
        if self.group:
            _widen(self.turned, steps, rotate(x, self.group), layer.operation.channel_axis)
        samples = torch.arange(min(len(x), most)) * len(x) // min(len(x), most)
        available = layer.operation.places(output)
        each = min(available, most // len(samples))
        # Take other places at each call, so that all of them have their turn.
        places = (torch.arange(each) * available // each + 7 * len(self.rows)) % available
        self.rows.append(layer.operation.inputs_at(x[samples], layer.weight.shape[2:], places).float().cpu())
        self.steps.append(steps[samples].repeat_interleave(each))


def _widen(extremes: Extremes, steps: Tensor, x: Tensor, axis: int) -> None:
    """Let `extremes` take in an input with its channels at `axis`, whose samples stand at `steps` `[B]`."""
    channels = x.movedim(axis, 1).reshape(len(x), extremes.low.shape[1], -1).float()
    index = steps[:, None].expand(-1, channels.shape[1])
    extremes.low.scatter_reduce_(0, index, channels.amin(dim=2).cpu(), "amin")
    extremes.high.scatter_reduce_(0, index, channels.amax(dim=2).cpu(), "amax")


@contextmanager
def observed(
    layers: Mapping[str, CalibratedLayer],
    steps: StepContext,
    calls: int,
    *,
    rotations: Mapping[str, int] = MappingProxyType({}),
    most: int = MOST,
) -> Iterator[dict[str, Seen]]:
    """Note what `layers` read in the next `calls` calls of the denoiser, also with at most so many channels
    together rotated as `rotations` say; at most `most` rows are kept.
    """
    count = len(steps.timesteps)
    seen = {name: Seen.nothing(layer, count, rotations.get(name, 0)) for name, layer in layers.items()}

    def note(call: ModuleCall) -> None:
        layer = layers[call.name]
        rows = min(most, max(FEWEST, KEPT // layer.weight[0].numel()))
        seen[call.name].update(layer, call.args[0], call.output, steps.index, most=max(1, rows // calls))

    with all_watched(layers, after=note):
        yield seen


@torch.no_grad()
def observe(
    denoiser: Denoiser,
    layers: Mapping[str, CalibratedLayer],
    steps: StepContext,
    batches: CalibrationStore | Sequence[Inputs],
    *,
    rotations: Mapping[str, int],
    advance: Advance,
    most: int = MOST,
) -> dict[str, Seen]:
    """Run the full-precision `denoiser` over `batches`, and return what `layers` read, at most `most` rows of
    it; a layer that none reaches is left out.
    """
    with observed(layers, steps, len(batches), rotations=rotations, most=most) as seen:
        for inputs in batches:
            denoiser(inputs)
            advance()
    return {name: found for name, found in seen.items() if found.rows}


def _entered(
    layer: CalibratedLayer, extremes: Extremes, rows: Tensor, steps: Tensor, segments: tuple[int, ...]
) -> Tensor:
    """Return transformed `rows` `[groups, R, n]` as they come out of the layer's quantizer, on grids over
    exact `extremes`, those of `segments` if there are any.
    """
    quantizer = layer.input_quantizer
    if quantizer is None:
        return rows
    if not isinstance(quantizer, ActivationQuantizer):
        # This quantizer has a grid for each token, and a token is a row.
        return (quantizer.parted(segments) if segments else quantizer)(rows)
    low, high = extremes.low, extremes.high
    if not quantizer.per_step:
        low, high, steps = (
            low.amin(dim=0, keepdim=True),
            high.amax(dim=0, keepdim=True),
            torch.zeros_like(steps),
        )
    widths = segments or quantizer.segments or (low.shape[1],)
    grids = [
        from_range(below.amin(dim=1), above.amax(dim=1), quantizer.format)
        for below, above in zip(low.split(widths, dim=1), high.split(widths, dim=1), strict=True)
    ]
    scale, zero = (
        spread(torch.stack(column, dim=1), widths, axis=1)[steps] for column in zip(*grids, strict=True)
    )
    taps = rows.shape[2] * layer.operation.groups // low.shape[1]
    scale, zero = (
        value.unflatten(1, (layer.operation.groups, -1)).transpose(0, 1).repeat_interleave(taps, dim=2)
        for value in (scale, zero)
    )
    return fake_quantize(rows, scale, zero, quantizer.format.levels)


def entering(layer: CalibratedLayer, seen: Seen, transform: Transform) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weight for transformed inputs, and what it has read of them, `[groups, R, n]`: in full
    precision, and quantized.
    """
    groups, factor = layer.operation.groups, transform.factor
    exact, rows = layer.weight.float().cpu(), torch.cat(seen.rows, dim=1)
    weight, changed = exact, rows
    extremes = seen.extremes(transform)
    taps = rows.shape[2] * groups // extremes.low.shape[1]
    if factor is not None:
        weight = exact / by_row(factor, exact, groups)
        changed = rows * factor.reshape(groups, 1, -1).repeat_interleave(taps, dim=2)
    if transform.rotated:
        weight, changed = rotate(weight, transform.rotated), rotate(changed, transform.rotated)
    if transform.order is not None:
        weight = weight.index_select(1, transform.order)
        changed = changed.unflatten(2, (-1, taps)).index_select(2, transform.order).flatten(2)
        extremes = Extremes(*(values[:, transform.order] for values in (extremes.low, extremes.high)))
    return weight, changed, _entered(layer, extremes, changed, torch.cat(seen.steps), transform.segments)


def output_error(layer: CalibratedLayer, seen: Seen, transform: Transform, *, ranges: str) -> float:
    """Return the squared error of a layer's output on what it has read, with its inputs transformed,
    quantized, and nearest codes of its weight.
    """
    weight, _, entered = entering(layer, seen, transform)
    grid = layer.grid.refitted(weight, method=ranges, segments=transform.segments)
    rounded = grid.decode(grid.encode(weight))
    groups, exact, rows = layer.operation.groups, layer.weight.float().cpu(), torch.cat(seen.rows, dim=1)
    full, found = (w.flatten(1).unflatten(0, (groups, -1)).mT for w in (exact, rounded))
    return float((entered @ found - rows @ full).double().square().sum())


class Reader(NamedTuple):
    """A layer, what it has read, and how ranges of its weight are found."""

    layer: CalibratedLayer
    seen: Seen
    ranges: str

    def error(self, transform: Transform) -> float:
        """Return `output_error` with its inputs transformed, times its price."""
        return output_error(self.layer, self.seen, transform, ranges=self.ranges) * price_of(transform)


def price_of(transform: Transform) -> float:
    """Return what the error that a transform leaves is multiplied by where it is compared with others."""
    return 1 if transform.order is None else 1 / (1 - CLUSTERED)


def clustered(layer: CalibratedLayer, seen: Seen, transform: Transform, count: int) -> Iterator[Transform]:
    """Yield a transform whose channels are in at most `count` clusters; nothing where they are too few, or in
    groups.
    """
    extremes = seen.extremes(transform)
    if count < 2 or layer.operation.groups > 1 or extremes.low.shape[1] < 2 * count:
        return
    order, segments = clusters(extremes.low, extremes.high, count)
    if len(segments) > 1:
        yield replace(transform, order=order.int(), segments=segments)


def proposed(readers: Sequence[Reader], equalizers: Iterable[str], count: int = 0) -> Iterator[Transform]:
    """Yield the transforms of what layers read that are to be tried beside none, each with and without
    `count` clusters of channels, 0 for none.
    """
    layer, seen = readers[0].layer, readers[0].seen
    yield from clustered(layer, seen, Transform(), count)
    for transform in _unclustered(readers, equalizers):
        yield transform
        yield from clustered(layer, seen, transform, count)


def _unclustered(readers: Sequence[Reader], equalizers: Iterable[str]) -> Iterator[Transform]:
    first, seen = readers[0].layer, readers[0].seen
    weights = columns(
        torch.cat([reader.layer.weight.float().cpu() for reader in readers]), first.operation.groups
    )
    for name in equalizers:
        for factor in map(power_of_two, EQUALIZERS[name](seen.plain, weights)):
            if not bool((factor == 1).all()):
                yield Transform(factor)
    if seen.group:
        yield Transform(rotated=seen.group)


def best_transform(readers: Sequence[Reader], *, equalizers: Iterable[str], clusters: int = 0) -> Transform:
    """Return what leaves the least error in layers that read the same tensor, the mean of their shares of the
    error without it: a factor, or a rotation where they were looked at for one, at most so many `clusters` of
    channels if that is worth it; nothing where no transform takes away `WORTH` of the error.

    One transform for all is computed once. It can also be stored where a format joins their weights.
    """
    without = [max(reader.error(Transform()), torch.finfo(torch.float32).tiny) for reader in readers]
    kept, least = Transform(), 1 - WORTH
    for transform in proposed(readers, equalizers, clusters):
        shares = [reader.error(transform) / error for reader, error in zip(readers, without, strict=True)]
        if sum(shares) / len(shares) < least:
            kept, least = transform, sum(shares) / len(shares)
    return kept
