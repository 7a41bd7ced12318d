"""What a layer's rounding sees of the calibration data: second moments of its inputs, and of its error in
reproducing full precision.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tfmq.calibration.forward import watched
from tfmq.calibration.spool import Column, Spool
from tfmq.nn.layer import CalibratedLayer

Run = Callable[[Tensor], Any]


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
    """Gathers the moments of the layers of a unit, each when those before it are rounded.

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

    @torch.no_grad()
    def record_targets(self, run: Run) -> None:
        """Keep the outputs that `run`, the unit in full precision, has at the drawn positions."""

        def see(name: str, _: Tensor, output: Tensor) -> None:
            operation = self.layers[name].operation
            places = (
                torch.randperm(operation.places(output), generator=self.generator)[: self.most].sort().values
            )
            target = operation.outputs_at(output, places)
            self.places[name].append(places)
            self.targets.setdefault(name, self.spool.column(target)).add(target)

        with watched(self.layers, see):
            for part in self.parts:
                run(part)

    @torch.no_grad()
    def moments(self, name: str, run: Run, *, widest: int) -> Moments:
        """Return the moments of a layer at what it reads while `run` calls the quantized unit; its targets
        are forgotten.

        At most `widest` columns are taken together.
        """
        layer, targets, kept = self.layers[name], self.targets.pop(name), enumerate(self.places.pop(name))
        groups = layer.operation.groups
        weight = layer.weight.flatten(1).unflatten(0, (groups, -1)).float()
        sums = _zeros(weight, widest)
        reads: list[tuple[Tensor, Tensor]] = []

        def see(_: str, x: Tensor, __: Tensor) -> None:
            number, places = next(kept)
            reads.append(
                (
                    layer.operation.inputs_at(layer.entering(x), layer.weight.shape[2:], places).float(),
                    targets.batch(number),
                )
            )

        count = 0
        for part in self.parts:
            with watched({name: layer}, see):
                run(part)
            # Not in the hook: a mode that watches the unit's products is active there, and would count these
            # too.
            for read, target in reads:
                target = target if layer.bias is None else target - layer.bias
                _add(sums, read, target.float().unflatten(1, (groups, -1)).transpose(0, 1) - read @ weight.mT)
                count += len(target)
            reads.clear()
        for tensor in (
            *sums.hessians,
            sums.inputs,
            sums.residuals,
            sums.squares,
            *(() if sums.cross is None else (sums.cross,)),
        ):
            tensor /= count
        return sums


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
