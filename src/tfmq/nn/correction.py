"""A correction of what a denoiser predicts: a gain and a bias of every channel, by the step of each
sample.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tfmq.quantizers.part import Part
from tfmq.quantizers.steps import StepContext

# Attribute of the denoiser that holds its correction.
CORRECTION = "tfmq_correction"


class Correction(Part):
    """`gain[k, c] y + bias[k, c]` on the first `channels` of a prediction; the rest, such as a learned
    variance, stays as it is.

    `gain` and `bias` are float32 `[S, C]`, one row for each calibrated timestep. Where nothing was found they
    are the identity.

    Args:
        steps: the calibrated timesteps.
        channels: number of corrected channels.
        axis: where a prediction has its channels.
    """

    gain: Tensor
    bias: Tensor

    def __init__(self, steps: StepContext, *, channels: int, axis: int) -> None:
        super().__init__()
        # A tuple keeps the context from being registered as a child.
        self._steps = (steps,)
        self.channels = channels
        self.axis = axis
        self.register_buffer("gain", torch.ones(len(steps.timesteps), channels))
        self.register_buffer("bias", torch.zeros(len(steps.timesteps), channels))

    def take_rows(self, index: Tensor) -> None:
        """Keep the gains and biases of the timesteps `index`."""
        self.gain, self.bias = self.gain[index], self.bias[index]

    def forward(self, prediction: Tensor) -> Tensor:
        """Return the prediction times the gain plus the bias of its timestep, in its dtype."""
        index = self._steps[0].index
        if len(index) > 1:
            # Frames are folded into the batch axis sample by sample.
            index = index.repeat_interleave(prediction.shape[0] // len(index))
        shape = [1] * prediction.ndim
        shape[0], shape[self.axis % prediction.ndim] = len(index), self.channels
        gain, bias = self.gain[index].reshape(shape), self.bias[index].reshape(shape)
        head = prediction.narrow(self.axis, 0, self.channels)
        found = torch.addcmul(bias, gain, head.float()).to(prediction.dtype)
        rest = prediction.shape[self.axis] - self.channels
        return (
            torch.cat([found, prediction.narrow(self.axis, self.channels, rest)], dim=self.axis)
            if rest
            else found
        )


def attach_correction(module: nn.Module, correction: Correction) -> None:
    """Let every call of the denoiser `module` correct its prediction."""
    module.register_module(CORRECTION, correction)


def correction_of(module: nn.Module) -> Correction | None:
    """Return the correction of a denoiser's prediction; None where it has none."""
    found: Correction | None = module._modules.get(CORRECTION)  # type: ignore[assignment]
    return found


def corrected(module: nn.Module, output: Any) -> Any:
    """Return the output of a denoiser with its prediction corrected, as far as it has a correction."""
    correction = correction_of(module)
    return output if correction is None else with_prediction(output, correction)


def with_prediction(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return the output of a denoiser with its first tensor, the prediction, changed."""
    leaves, structure = tree_flatten(output)
    place = next(place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[place] = change(leaves[place])
    return tree_unflatten(leaves, structure)
