"""What a layer's rounding sees of the calibration data: second moments of its inputs, and of its error in
reproducing full precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq.calibration.forward import dependents, ended
from tfmq.calibration.spool import Column, Spool
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.watch import ModuleCall, all_watched

Run = Callable[[Tensor], Any]
# Moments that are gathered in one pass take at most so many times the bytes of the largest layer's.
TOGETHER = 3


@dataclass
class Moments:
    """Means over sampled output positions, of a layer with G groups of R rows and n columns.

    `hessians` are the blocks `[G, p, p]` of `x x^T` for each part of the columns that is solved together,
    `cross` `[G, R, n]` is that of `r x^T` (None where there are several parts, which make no use of it),
    `inputs` `[G, n]` of `x`, `residuals` `[G, R]` of `r` and `squares` `[G, R]` of `r^2`: x is what the layer
    reads in the quantized network, and r what its full-precision weight leaves of the full-precision
    network's output there.
    """

    hessians: tuple[Tensor, ...]
    cross: Tensor | None
    inputs: Tensor
    residuals: Tensor
    squares: Tensor

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the columns of each part with their block."""
        start = 0
        for hessian in self.hessians:
            yield slice(start, start + hessian.shape[1]), hessian
            start += hessian.shape[1]

    def centre(self) -> None:
        """Put the covariances in the place of the second moments: what is left to the weights when a bias
        takes the means.
        """
        for part, hessian in self.parts():
            hessian -= self.inputs[:, part, None] * self.inputs[:, None, part]
        if self.cross is not None:
            self.cross -= self.residuals[:, :, None] * self.inputs[:, None, :]
        self.squares -= self.residuals.square()

    def mean_square(self) -> Tensor:
        """Return the mean square of the inputs of each group, `[G]`."""
        return torch.cat([hessian.diagonal(dim1=1, dim2=2) for hessian in self.hessians], dim=1).mean(dim=1)

    def damp(self, amount: Tensor) -> None:
        """Add `amount` `[G]` to the diagonal."""
        for hessian in self.hessians:
            diagonal = hessian.diagonal(dim1=1, dim2=2)
            diagonal += amount[:, None]


class Regression:
    """Gathers the moments of the layers of a unit, each when those that it reads from are rounded.

    Args:
        layers: the layers of the unit, by name.
        parts: indices of the samples of each batch.
        most: output positions of a sample that count, drawn anew for each batch and layer.
        seed: seeds the draw of the positions.
        spool: keeps the targets; by default in memory.
    """

    def __init__(
        self,
        layers: Mapping[str, CalibratedLayer],
        parts: Sequence[Tensor],
        *,
        most: int,
        seed: int,
        spool: Spool | None = None,
    ) -> None:
        self.layers = layers
        self.parts = parts
        self.most = most
        self.generator = torch.Generator().manual_seed(seed)
        self.spool = spool or Spool()
        self.places: dict[str, list[Tensor]] = {name: [] for name in layers}
        self.targets: dict[str, Column] = {}
        self.passes = 0

    @torch.no_grad()
    def record_targets(self, run: Run) -> None:
        """Keep the outputs that `run`, the unit in full precision, has at the drawn positions."""

        def see(call: ModuleCall) -> None:
            name, output = call.name, call.output
            operation = self.layers[name].operation
            places = (
                torch.randperm(operation.places(output), generator=self.generator)[: self.most].sort().values
            )
            target = operation.outputs_at(output, places)
            self.places[name].append(places)
            self.targets.setdefault(name, self.spool.column(target)).add(target)

        with all_watched(self.layers, after=see):
            for part in self.parts:
                run(part)

    @torch.no_grad()
    def passes_of(self, run: Run, *, widest: int) -> list[list[str]]:
        """Return which layers are gathered together, in execution order: those that read nothing of each
        other, as the three projections in front of an attention product, as long as their moments take no
        more than `TOGETHER` times those of the largest layer.
        """
        readers = dependents(self.layers, lambda: run(self.parts[0][:1]))
        sizes = {name: moments_bytes(layer, widest) for name, layer in self.layers.items()}
        found: list[list[str]] = []
        waiting = list(self.layers)
        while waiting:
            held = set().union(*(readers[other] - {other} for other in waiting))
            free = [name for name in waiting if name not in held]
            # Where all read from each other, as in a loop, they go in the order of their first calls.
            together = (free or waiting)[:1]
            for name in free[1:]:
                if sum(sizes[other] for other in (*together, name)) <= TOGETHER * max(sizes.values()):
                    together.append(name)
            found.append(together)
            waiting = [name for name in waiting if name not in together]
        return found

    @torch.no_grad()
    def moments(self, names: Sequence[str], run: Run, *, widest: int) -> dict[str, Moments]:
        """Return the moments of some layers at what they read while `run` calls the quantized unit; their
        targets are forgotten.

        At most `widest` columns are taken together. From the second time on a run ends when these layers have
        been reached.
        """
        gathering = {
            name: _Gathering(
                self.layers[name], self.places.pop(name), self.targets.pop(name), len(self.parts), widest
            )
            for name in names
        }
        whole, self.passes = self.passes == 0, self.passes + 1

        def see(call: ModuleCall) -> bool:
            gathering[call.name].see(call.args[0])
            return not whole and all(one.complete for one in gathering.values())

        for part in self.parts:
            with ended({name: self.layers[name] for name in names}, see):
                run(part)
            # Not in the hook: a mode that watches the unit's products is active there, and would count these
            # too.
            for one in gathering.values():
                one.add()
        return {name: one.mean() for name, one in gathering.items()}


class _Gathering:
    """The moments of one layer, batch by batch."""

    def __init__(
        self, layer: CalibratedLayer, places: Sequence[Tensor], targets: Column, batches: int, widest: int
    ) -> None:
        self.layer = layer
        self.targets = targets
        self.places = enumerate(places)
        self.calls = len(places) // batches
        self.weight = layer.weight.flatten(1).unflatten(0, (layer.operation.groups, -1)).float()
        self.sums = _zeros(self.weight, widest)
        self.reads: list[tuple[Tensor, Tensor]] = []
        self.count = 0

    @property
    def complete(self) -> bool:
        """Whether all calls of a batch have been seen."""
        return len(self.reads) == self.calls

    def see(self, x: Tensor) -> None:
        """Take what the layer reads in a call."""
        layer = self.layer
        number, places = next(self.places)
        read = layer.operation.inputs_at(layer.entering(x), layer.weight.shape[2:], places).float()
        target, beside = self.targets.batch(number), layer.beside(x)
        # What a branch puts out is left to it.
        target = target if beside is None else target - layer.operation.outputs_at(beside, places)
        self.reads.append((read, target))

    def add(self) -> None:
        """Add what was seen of a batch."""
        layer = self.layer
        for read, target in self.reads:
            target = target if layer.bias is None else target - layer.bias
            wanted = target.float().unflatten(1, (len(self.weight), -1)).transpose(0, 1)
            _add(self.sums, read, wanted - read @ self.weight.mT)
            self.count += len(target)
        self.reads.clear()

    def mean(self) -> Moments:
        """Return the means over what was added."""
        sums = self.sums
        cross = () if sums.cross is None else (sums.cross,)
        for tensor in (*sums.hessians, sums.inputs, sums.residuals, sums.squares, *cross):
            tensor /= self.count
        return sums


def moments_bytes(layer: CalibratedLayer, widest: int) -> int:
    """Return the bytes of a layer's second moments in float64, `widest` columns together."""
    whole, rest = divmod(layer.weight[0].numel(), widest)
    return 8 * layer.operation.groups * (whole * widest**2 + rest**2)


def _zeros(weight: Tensor, widest: int) -> Moments:
    """Return no moments yet of a layer with the weight `[G, R, n]`."""
    groups, rows, columns = weight.shape
    sizes = [min(widest, columns - start) for start in range(0, columns, widest)]
    double: dict[str, Any] = {"dtype": torch.float64, "device": weight.device}
    return Moments(
        tuple(torch.zeros(groups, size, size, **double) for size in sizes),
        torch.zeros(groups, rows, columns, **double) if len(sizes) == 1 else None,
        torch.zeros(groups, columns, **double),
        torch.zeros(groups, rows, **double),
        torch.zeros(groups, rows, **double),
    )


def _add(sums: Moments, read: Tensor, residual: Tensor) -> None:
    """Add what was read `[G, P, n]` and left over `[G, P, R]` at some positions; products in float32, sums in
    float64.
    """
    for part, hessian in sums.parts():
        hessian += read[:, :, part].mT @ read[:, :, part]
    if sums.cross is not None:
        sums.cross += residual.mT @ read
    sums.inputs += read.sum(dim=1)
    sums.residuals += residual.sum(dim=1)
    sums.squares += residual.square().sum(dim=1)
