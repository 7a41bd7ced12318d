"""What the rows of a layer are multiplied by so that its output follows full precision with gain one."""

import torch
from torch import Tensor

from tfmq.nn.layer import CalibratedLayer
from tfmq.reconstruction.regression import Moments

# A channel whose gain is further from one than this factor follows no signal, but noise.
MOST_GAIN = 1.25


class Output:
    """What the output of a layer in full precision has in common with that of other weights on quantized
    inputs.

    Made of undamped moments; it keeps what it needs of them.
    """

    def __init__(self, layer: CalibratedLayer, moments: Moments) -> None:
        assert moments.cross is not None
        self.shape = moments.cross.shape
        weight = layer.weight.double().flatten(1).reshape(self.shape)
        # The means of y x^T and y^2, row by row, where y = w x + r is the output in full precision.
        self.inputs = weight @ moments.hessians[0] + moments.cross
        self.square = ((self.inputs + moments.cross) * weight).sum(dim=2) + moments.squares

    def gain(self, weight: Tensor) -> Tensor:
        """Return what to multiply the rows of `weight` by, `[C_out]`: the output then has its full share of
        the full-precision one.
        """
        shared = (self.inputs * weight.double().flatten(1).reshape(self.shape)).sum(dim=2)
        gain = torch.where(shared > 0, self.square / shared, torch.ones_like(shared))
        return gain.clamp(1 / MOST_GAIN, MOST_GAIN).flatten().to(weight.dtype)
