"""Static or dynamic grids for the input of a layer, whichever leaves less error in its output on the
calibration calls.

Published results disagree: per-token dynamic grids are near lossless on transformers whose tokens have
outliers (Q-DiT), static ones cost no pass over the input and their fitted range cuts off what is rare. So
each layer is measured.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tfmq.calibration.energies import Parts, layer_energies
from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.progress import Advance
from tfmq.quantizers.dynamic import DynamicQuantizer
from tfmq.quantizers.input import InputQuantizer


@dataclass(frozen=True)
class InputErrors:
    """Errors of a layer's output under two quantizers of its input: energy of the error over energy of the
    output, with full-precision weights.
    """

    static: float
    dynamic: float

    @property
    def kept(self) -> str:
        """The kind with less error, `static` or `dynamic`; a tie goes to the static one, which costs nothing
        at inference.
        """
        return "dynamic" if self.dynamic < self.static else "static"


def _dynamic(quantizer: InputQuantizer) -> DynamicQuantizer:
    return DynamicQuantizer(quantizer.format, segments=quantizer.segments)


def _parts(layer: CalibratedLayer) -> Parts:
    """Return what gives the output and both errors in it."""
    static = layer.input_quantizer
    assert static is not None
    dynamic = _dynamic(static)
    weight: Tensor = layer.weight
    if layer.branch is not None and layer.branch.shared:
        weight = weight + layer.branch.product()

    def parts(x: Tensor) -> list[Tensor]:
        x = layer.transformed(x).float()
        # The layer is linear, so the error of its output is the layer applied to the error of its input.
        return [layer.operation(part, weight.float(), None) for part in (x, static(x) - x, dynamic(x) - x)]

    return parts


def measure_inputs(
    denoiser: Denoiser, layers: Mapping[str, CalibratedLayer], batches: Iterable[Inputs], *, advance: Advance
) -> dict[str, InputErrors]:
    """Run the full-precision `denoiser` over `batches` and return what fitted and dynamic grids do to each of
    `layers`, which read tokens.

    A layer that no call reaches has no error either way.
    """
    energies = layer_energies(denoiser, layers, _parts, batches, count=3, advance=advance)
    relative = {
        name: (row[1:] / row[0].clamp(min=torch.finfo(row.dtype).tiny)).tolist()
        for name, row in energies.items()
    }
    return {name: InputErrors(*errors) for name, errors in relative.items()}


def keep_better(layers: Mapping[str, CalibratedLayer], errors: Mapping[str, InputErrors]) -> None:
    """Give each of `layers` the input quantizer with less error, in place."""
    for name, found in errors.items():
        quantizer = layers[name].input_quantizer
        if found.kept == "dynamic" and quantizer is not None:
            layers[name].input_quantizer = _dynamic(quantizer)
