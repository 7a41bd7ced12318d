"""Choose the grid of a layer's weight and the size of its groups: the error of the layer's output on the
calibration calls decides, against what a weight takes.

Grids and codes are fitted to the weight alone, so that no candidate has seen the inputs that judge it. A bit
more for each code makes steps half as large, and the energy of their errors a quarter; so whatever else takes
bits has to do as much for them. Codes are the nearest ones: the solver comes later, and takes as long for
each candidate as for the one that is kept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from tfmq.calibration.energies import Parts, layer_energies
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.numerics.grids import Grid
from tfmq.numerics.packing import packed_shape
from tfmq.progress import Advance
from tfmq.quantizers.weight import WeightGrid, fit_grid

# The grids that a weight may get, each with the most channels of a group.
Choices = Sequence[tuple[Grid, int]]


@dataclass(frozen=True)
class GridErrors:
    """What each candidate for the grid of a weight does to the output, energy of the error over energy of the
    output, and the bits that a weight takes with it, scales and zero-points included.
    """

    errors: tuple[float, ...]
    bits: tuple[float, ...]

    def tensor(self) -> Tensor:
        """Return both, float64 `[2, n]`."""
        return torch.tensor([self.errors, self.bits], dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> "GridErrors":
        """Undo `tensor`."""
        errors, bits = values.tolist()
        return cls(tuple(errors), tuple(bits))

    @property
    def kept(self) -> int:
        """The number of the best candidate: the least error times 4 to the power of its bits, the fewer bits
        of equals; the first where no call reached the layer.
        """
        if not any(self.errors):
            return 0
        costs = [(error * 4.0**bits, bits) for error, bits in zip(self.errors, self.bits, strict=True)]
        return costs.index(min(costs))


def stored_bits(grid: WeightGrid, shape: Sequence[int]) -> float:
    """Return the bits of a weight of `shape` on a grid, with all that is stored beside the codes."""
    whole = 0 if grid.multiplier is None else grid.multiplier.numel()
    zeros = 0 if grid.format.symmetric else grid.zero_point.numel()
    codes = prod(packed_shape(shape, bits=grid.format.bits))
    return 8 * (codes + 4 * grid.scale.numel() + zeros + whole) / prod(shape)


def candidates(layer: CalibratedLayer, choices: Choices, *, ranges: str) -> list[WeightGrid]:
    """Return the grids of a layer's weight that there are to choose from: its own, of the first of `choices`,
    and those fitted for the others.
    """
    return [layer.grid, *(candidate(layer, *choice, ranges=ranges) for choice in choices[1:])]


def candidate(layer: CalibratedLayer, fmt: Grid, group: int, *, ranges: str) -> WeightGrid:
    """Fit one of the grids that a layer's weight may have."""
    return fit_grid(layer.weight, fmt, segments=layer.grid.segments, group=group, method=ranges)


def measure_grids(
    denoiser: Denoiser,
    layers: Mapping[str, CalibratedLayer],
    grids: Mapping[str, Sequence[WeightGrid]],
    batches: Iterable[Inputs],
    *,
    advance: Advance,
) -> dict[str, GridErrors]:
    """Run the full-precision `denoiser` over `batches` and return what each of `grids` does to its layer."""
    count = max(map(len, grids.values()))
    names = {layer: name for name, layer in layers.items()}

    def parts_of(layer: CalibratedLayer) -> Parts:
        weight = layer.weight.float()
        changes = [grid.decode(grid.encode(weight)) - weight for grid in grids[names[layer]]]

        def parts(x: Tensor) -> list[Tensor]:
            x = layer.transformed(x).float()
            # The layer is linear, so the error of its output is what the error of its weight computes.
            return [layer.operation(x, part, None) for part in (weight, *changes)]

        return parts

    energies = layer_energies(denoiser, layers, parts_of, batches, count=1 + count, advance=advance)
    found = {}
    for name, row in energies.items():
        own = grids[name]
        errors = row[1 : 1 + len(own)] / row[0].clamp(min=1e-300)
        bits = (stored_bits(grid, layers[name].weight.shape) for grid in own)
        found[name] = GridErrors(tuple(errors.tolist()), tuple(bits))
    return found
