"""Energies of what layers compute, added up over calls of the full-precision network."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.layer import CalibratedLayer
from tfmq.nn.swap import precision
from tfmq.nn.watch import ModuleCall, all_watched
from tfmq.progress import Advance

# Returns the tensors that count of a layer's input, such as its output and an error of that.
Parts = Callable[[Tensor], Sequence[Tensor]]


@torch.no_grad()
def layer_energies(
    denoiser: Denoiser,
    layers: Mapping[str, CalibratedLayer],
    parts_of: Callable[[CalibratedLayer], Parts],
    batches: Iterable[Inputs],
    *,
    count: int,
    advance: Advance = lambda amount=1: None,
) -> dict[str, Tensor]:
    """Run the full-precision `denoiser` over `batches` and return the energies of the `count` parts of each
    of `layers`, float64 `[count]`; 0 where no call reaches it.
    """
    energies = {name: torch.zeros(count, dtype=torch.float64) for name in layers}
    parts = {name: parts_of(layer) for name, layer in layers.items()}

    def see(call: ModuleCall) -> None:
        for index, part in enumerate(parts[call.name](call.args[0])):
            energies[call.name][index] += part.float().square().sum(dtype=torch.float64).cpu()

    with precision(denoiser.module, weights="full", inputs="full"), all_watched(layers, after=see):
        for inputs in batches:
            denoiser(inputs)
            advance()
    return energies
