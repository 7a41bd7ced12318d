"""Static activation quantizers: one scale for all timesteps, or one per timestep (finite set calibration)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tfmq.kernels.kernel import Rows
from tfmq.numerics.affine import in_dtype
from tfmq.numerics.grids import IntegerFormat
from tfmq.numerics.segments import scales, spread
from tfmq.quantizers.input import InputQuantizer
from tfmq.quantizers.steps import StepContext


class ActivationQuantizer(InputQuantizer):
    """Per-tensor fake quantization with a table `scale`, `zero_point` of shape `[S, G]`.

    `S` is the number of calibrated timesteps, or 1 for a static range; each sample of a batch uses the row of
    its own timestep. `G` is the number of channel segments: where a layer reads a concatenation of sources
    with different ranges (UNet skips; Q-Diffusion, Li et al., 2023), `segments` holds their widths along
    `axis` and each has its own grid. Without segments `G` is 1.

    Raises:
        ValueError: an input whose `axis` does not have `sum(segments)` channels, or whose rows are no
            multiple of the batch's timesteps.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        fmt: IntegerFormat,
        *,
        steps: StepContext | None = None,
        segments: Sequence[int] = (),
        axis: int = 1,
    ) -> None:
        super().__init__(fmt, segments=segments, axis=axis)
        # A tuple keeps the context from being registered as a child of each of its readers.
        self._steps = (steps,)
        shape = (len(steps.timesteps) if steps else 1, scales(self.segments))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero_point", torch.zeros(shape, dtype=torch.uint8))

    @property
    def per_step(self) -> bool:
        """Whether the table has a row per timestep."""
        return self._steps[0] is not None

    def parted(self, segments: Sequence[int]) -> "ActivationQuantizer":
        """Return another one of the same timesteps."""
        found = ActivationQuantizer(self.format, steps=self._steps[0], segments=segments, axis=self.axis)
        return found.to(self.scale.device)

    @torch.no_grad()
    def fit(self, scale: Tensor, zero_point: Tensor) -> None:
        """Store fitted parameters, each `[S, G]`; with one row the quantizer is a static one from then on."""
        if len(scale) == 1 and len(self.scale) > 1:
            self._steps = (None,)
            self.scale, self.zero_point = self.scale[:1].clone(), self.zero_point[:1].clone()
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def take_rows(self, index: Tensor) -> None:
        """Keep the grids of the timesteps `index`; one grid for all timesteps stays."""
        if self.per_step:
            self.scale, self.zero_point = self.scale[index], self.zero_point[index]

    def rows(self, x: Tensor) -> Rows:
        """Return the grid of each sample of `x`, or one row for all."""
        steps = self._steps[0]
        if steps is None:
            return Rows(self.scale, self.zero_point, self.format.levels)
        index = steps.index
        rows, batch = x.shape[0], index.shape[0]
        if batch > 1 and rows != batch:
            if rows % batch or rows < batch:
                raise ValueError(f"an input of {rows} rows does not follow a batch of {batch} timesteps")
            # Heads and frames are folded into the batch axis sample by sample.
            index = index.repeat_interleave(rows // batch)
        return Rows(self.scale, self.zero_point, self.format.levels, index)

    def zero_points(self) -> Tensor:
        """Return the fitted zero-points, `[S or 1, G]`."""
        return self.zero_point

    def describe(self) -> dict[str, Any]:
        """Return grid, segments and axis, and whether each timestep has a grid of its own."""
        grid = {"bits": self.format.bits, "symmetric": self.format.symmetric}
        return {**grid, "per_step": self.per_step, "segments": list(self.segments), "axis": self.axis}

    def broadcast(self, values: Tensor, x: Tensor) -> Tensor:
        """Return a field with a value for each sample and channel."""
        values, shape = spread(values, self.segments, axis=1), [1] * x.ndim
        # Numbers, and no shape of a tensor: traced, that would be several nodes.
        shape[0], shape[self.axis % x.ndim] = -1, sum(self.segments) or 1
        return in_dtype(values.reshape(shape), x.dtype)

    def extra_repr(self) -> str:
        """Return bits, timesteps and segments for the printed model."""
        steps, segments = self.scale.shape
        return f"bits={self.format.bits}, steps={steps}, segments={segments}"
