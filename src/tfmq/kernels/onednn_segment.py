"""A weight as oneDNN, the library inside torch on x86, wants it, and what it computes with it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tfmq.kernels.halves import terms
from tfmq.numerics.operations import Operation
from tfmq.numerics.window import Window


def pads(window: Window) -> bool:
    """Whether the library lays an input out as a window wants it: without spaces, and with as many zeros
    behind it as in front.

    No window may lie in the padding altogether: for a single input channel the library (torch 2.13) then
    returns what memory happens to hold.
    """
    reach = (step * (taps - 1) for taps, step in zip(window.size, window.dilation, strict=True))
    return not window.spaced and all(
        before == after and 0 <= before <= most
        for (before, after), most in zip(window.border, reach, strict=True)
    )


class PackedSegment:
    """One input segment of a layer: its weight, packed for inputs of `size` `(B, ...)`, and the sums of its
    integers for each output channel.
    """

    def __init__(self, operation: Operation, values: Tensor, scale: Tensor, size: Sequence[int]) -> None:
        self.groups, self.window = operation.groups, operation.window(values.shape[2:])
        self.scale = scale.float().contiguous()
        self.zeros = torch.zeros(len(scale), dtype=torch.int32)
        self.ones = torch.ones_like(self.scale)
        self.sums = values.float().flatten(1).sum(dim=1)
        narrow = [self.window.slid(term).to(torch.int8).contiguous() for term in terms(values)]
        if not self.window.size:
            self.packed = [torch.ops.onednn.qlinear_prepack(term, None) for term in narrow]
        else:
            # Treat one spatial axis as the second of two.
            narrow = [term.unsqueeze(2) if term.ndim == 3 else term for term in narrow]
            self.stride, self.dilation = [[1, *v][-2:] for v in (self.window.stride, self.window.dilation)]
            self.pads = pads(self.window)
            self.padding = [0, *(before for before, _ in self.window.border)][-2:] if self.pads else [0, 0]
            self.reach = self.dilation[1] * (narrow[0].shape[-1] - 1)
            # Pack with a zero-point, so that the packed weight serves any zero-point later.
            geometry = self.stride, self.padding, self.dilation, self.groups
            batch, *places = size
            places = list(places if self.pads else self.window.extent(places))
            shape = [batch, narrow[0].shape[1] * self.groups, *[1, *places][-2:]]
            self.packed = [
                torch.ops.onednn.qconv_prepack(term, self.scale, 1.0, 1, *geometry, shape) for term in narrow
            ]

    def fused(self, codes: Tensor, scale: float, zero_point: int, bias: Tensor | None) -> Tensor:
        """Return `(sum (q - z) v) s s_w + bias` in float32. Of halves each is scaled: their sums would take
        another pass over the output.
        """
        return self._padded_run(codes, scale, zero_point, self.scale, bias)

    def sums_of(self, codes: Tensor) -> Tensor:
        """Return `sum q v` over codes `q` that are laid out already, float32."""
        return self._run(codes, 1.0, 0, self.ones, None, [0, 0])

    def centred_sums_of(self, codes: Tensor, zero_point: int) -> Tensor:
        """Return `sum (q - z) v`, float32."""
        return self._padded_run(codes, 1.0, zero_point, self.ones, None)

    def _padded_run(
        self, codes: Tensor, scale: float, zero_point: int, weight_scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        if not self.window.size:
            return self._run(codes, scale, zero_point, weight_scale, bias, [])
        codes = codes if self.pads else self.window.laid_out(codes, zero_point)
        return self._run(codes, scale, zero_point, weight_scale, bias, self.padding)

    def _run(
        self,
        codes: Tensor,
        scale: float,
        zero_point: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        padding: list[int],
    ) -> Tensor:
        if not self.window.size:
            return self._summed(
                torch.ops.onednn.qlinear_pointwise, codes, scale, zero_point, weight_scale, bias
            )
        geometry = self.stride, padding, self.dilation, self.groups
        wide = codes.unsqueeze(2) if codes.ndim == 3 else codes
        # Where a strided convolution puts out one column, the library (torch 2.13, on AMX tiles) adds up
        # wrong rows: let it put out two.
        stride, columns = self.stride[1], wide.shape[3] + 2 * geometry[1][1] - self.reach
        narrow = stride > 1 and columns <= stride
        if narrow:
            wide = F.pad(wide, (0, stride), value=zero_point).contiguous(memory_format=torch.channels_last)
        y = self._summed(
            torch.ops.onednn.qconv2d_pointwise, wide, scale, zero_point, weight_scale, bias, *geometry
        )
        if narrow:
            y = y[..., :1].contiguous(memory_format=torch.channels_last)
        return y.squeeze(2) if codes.ndim == 3 else y

    def _summed(
        self,
        operator: Callable[..., Tensor],
        codes: Tensor,
        scale: float,
        zero_point: int,
        weight_scale: Tensor,
        bias: Tensor | None,
        *geometry: Any,
    ) -> Tensor:
        """Return what an operator of the library gives for the terms of the weight, added up."""
        tail: tuple[Any, ...] = 1.0, 0, torch.float32, "none", [], ""
        total: Tensor | None = None
        for packed in self.packed:
            y = operator(codes, scale, zero_point, packed, weight_scale, self.zeros, bias, *geometry, *tail)
            total, bias = y if total is None else total.add_(y), None
        assert total is not None
        return total
