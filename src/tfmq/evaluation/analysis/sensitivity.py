"""What each part of a model costs the output: one unit quantized, everything else in full precision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.models.denoiser import Denoiser, Inputs
from tfmq.nn.swap import replace_module, steps_of
from tfmq.numerics.errors import relative_error
from tfmq.progress import Progress, silent
from tfmq.quantizers.steps import StepContext

TEMPORAL = "temporal layers"


@dataclass(frozen=True)
class LayerGroup:
    """Layers that are quantized together, under the name of their unit."""

    name: str
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Sensitivity:
    """Relative error of the model's output, `[parts, calls]`, with only that part quantized; `whole`
    `[calls]` with everything.
    """

    parts: tuple[LayerGroup, ...]
    timesteps: Tensor
    error: Tensor
    whole: Tensor


@contextmanager
def borrowed(module: nn.Module, other: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let `module` compute with the submodules `names` of `other` while the context is open."""
    own = {name: module.get_submodule(name) for name in names}
    try:
        for name in names:
            replace_module(module, name, other.get_submodule(name))
        yield
    finally:
        for name, child in own.items():
            replace_module(module, name, child)


def _error(reference: Tensor, output: Tensor) -> Tensor:
    """Return the mean over samples of their relative error."""
    return relative_error(reference.flatten(1), output.flatten(1)).mean().cpu()


@torch.no_grad()
def sensitivity(
    denoiser: Denoiser,
    quantized: Denoiser,
    parts: Sequence[LayerGroup],
    calls: Sequence[Inputs],
    *,
    progress: Progress = silent,
) -> Sensitivity:
    """Measure how each part alone disturbs the output of full-precision calls.

    Attention products stay in full precision: they belong to no layer. Layers whose input comes from a
    quantized one see it undisturbed.

    Args:
        denoiser: the full-precision model; as it was when this returns.
        quantized: its quantized twin, with the same names.
        parts: what to quantize, one after the other.
        calls: full-precision calls on the way from noise to image.
        progress: shows a bar.
    """
    steps: StepContext = steps_of(quantized.module)
    outputs = [denoiser(call) for call in calls]
    rows = []

    def at(call: Inputs) -> Tensor:
        with steps.at(call.timestep):
            return denoiser(call)

    with progress("sensitivity of units", len(parts)) as advance:
        for part in parts:
            with borrowed(denoiser.module, quantized.module, part.layers):
                errors = [_error(expected, at(call)) for call, expected in zip(calls, outputs, strict=True)]
            rows.append(torch.stack(errors))
            advance()
    whole = torch.stack(
        [_error(expected, quantized(call)) for call, expected in zip(calls, outputs, strict=True)]
    )
    timesteps = torch.stack([call.timestep.flatten()[0].float().cpu() for call in calls])
    return Sensitivity(
        tuple(parts), timesteps, torch.stack(rows) if rows else torch.zeros(0, len(calls)), whole
    )
