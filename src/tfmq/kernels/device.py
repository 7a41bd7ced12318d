"""A layer through the operators of `tfmq.kernels.operators`: on a GPU their kernels, anywhere else their
definitions.

The integers of the layer lie in buffers, in the layout of the operators, so that a kernel moves with the
model: `.to(device)` and the hooks that offload a model are all it takes. The buffers are no part of the state
dict.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tfmq.kernels.kernel import ACCUMULATOR, IntegerWeight, Rows
from tfmq.kernels.operators.multiply import convolution_codes, linear_codes, linear_weight_only
from tfmq.kernels.operators.product import product_codes
from tfmq.kernels.operators.quantize import quantize_codes
from tfmq.kernels.operators.weights import half_packed
from tfmq.numerics.operations import Operation
from tfmq.numerics.segments import spread
from tfmq.numerics.window import Window

# Largest number of segments that the operators take. No concatenation of a model here has more.
MAX_SEGMENTS = 4
# Number of values that four bits tell apart.
NIBBLE = 16


def refusal(weight: IntegerWeight, levels: int) -> str:
    """Return why the operators cannot compute a layer with a quantized input in exact integers; nothing where
    they can.
    """
    if not weight.narrow:
        return "its integer weights do not fit into eight signed bits (an asymmetric 8-bit grid)"
    if levels > 256 or weight.peak(levels) > ACCUMULATOR:
        return "its sums may leave int32"
    return shape_refusal(weight)


def shape_refusal(weight: IntegerWeight) -> str:
    """Return what about the shape of a layer has no operator; nothing if all has."""
    operation = weight.operation
    if len(weight.segments) > MAX_SEGMENTS:
        return f"its input has more than {MAX_SEGMENTS} segments with grids of their own"
    if operation.groups != 1:
        return f"it is a grouped {operation.kind}"
    window = operation.window(weight.values.shape[2:])
    if window.mirrored:
        return f"it is a {operation.kind}"
    return "" if weight.values.ndim <= 4 else f"it is a {operation.kind} over three axes"


def _bounds(weight: IntegerWeight) -> tuple[Tensor, Tensor]:
    """Return the least and the largest integer of each row and segment, `[N, G]`."""
    parts = [values.flatten(1) for values, _ in weight.parts()]
    return torch.stack([part.amin(dim=1) for part in parts], dim=1), torch.stack(
        [part.amax(dim=1) for part in parts], dim=1
    )


def fits_nibbles(weight: IntegerWeight) -> bool:
    """Whether the integers of every row and segment span no more than four bits."""
    low, high = _bounds(weight)
    return bool(((high - low) < NIBBLE).all() and (low >= -NIBBLE * 8 + 1).all())


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How a convolution reads its input: `padding` is top, left, bottom, right; one axis is the second of
    two.
    """

    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @classmethod
    def of(cls, window: Window) -> "Geometry":
        """Return the geometry of a window over one or two axes."""
        missing = 2 - len(window.size)
        stride, dilation = ([*[1] * missing, *values] for values in (window.stride, window.dilation))
        (top, bottom), (left, right) = [*[(0, 0)] * missing, *window.border]
        return cls(
            stride=(stride[0], stride[1]),
            dilation=(dilation[0], dilation[1]),
            padding=(top, left, bottom, right),
        )


def geometry_of(operation: Operation, values: Tensor) -> Geometry | None:
    """Return the geometry of a layer; None for a linear one, which a convolution of single pixels is too."""
    window = operation.window(values.shape[2:])
    return None if window.pointwise else Geometry.of(window)


def channels_last(x: Tensor, axis: int) -> Tensor:
    """Return a view of `x` whose last axis are the channels, `axis` before."""
    return x if axis == -1 else x.movedim(axis, -1)


def channels_back(y: Tensor, axis: int) -> Tensor:
    """Undo `channels_last`."""
    return y if axis == -1 else y.movedim(-1, axis)


class Integers(nn.Module):
    """The weight of a layer in device memory, channels last: `weight` `[N, C]` or `[N, KH, KW, C]`, its
    zero-point if it is packed, `scale`, `bias`.

    With `nibbles` two codes share a byte, which halves the weight; they are unpacked in registers.
    """

    weight: Tensor
    weight_zero: Tensor | None
    scale: Tensor
    sums: Tensor
    bias: Tensor | None

    def __init__(self, source: IntegerWeight, *, nibbles: bool) -> None:
        super().__init__()
        self.segments = source.segments
        self.geometry = geometry_of(source.operation, source.values)
        values = source.values if self.geometry is not None else source.values.flatten(1)
        values = values.unsqueeze(2) if values.ndim == 3 else values
        values, zero = values.movedim(1, -1), None
        if nibbles:
            zero = (-_bounds(source)[0]).to(torch.int8)
            wide = spread(zero, self.segments, axis=1)
            codes = values + wide.reshape(len(wide), *[1] * (values.ndim - 2), -1)
        sums = torch.stack([part.flatten(1).sum(dim=1) for part, _ in source.parts()], dim=1)
        self._keep(
            "weight", half_packed(codes, self.segments) if nibbles else values.to(torch.int8).contiguous()
        )
        self._keep("weight_zero", zero)
        self._keep("scale", source.scale.float().contiguous())
        self._keep("sums", sums.to(torch.int32))
        self._keep("bias", None if source.bias is None else source.bias.float().contiguous())

    def _keep(self, name: str, tensor: Tensor | None) -> None:
        self.register_buffer(name, None if tensor is None else tensor.clone(), persistent=False)


class OperatorKernel(Integers):
    """A layer with a quantized input: quantize, then multiply. `refusal` says which layers it takes.

    Its output is that of `ReferenceKernel` to the bit, with images channels-last.
    """

    first: Tensor

    def __init__(self, source: IntegerWeight, *, nibbles: bool = False) -> None:
        super().__init__(source, nibbles=nibbles)
        self.channel_axis = source.operation.channel_axis
        self._keep("first", torch.zeros(1, dtype=torch.int64, device=source.values.device))

    def _grid(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
        """Return the tables as the operators have them, `[S, G]`, the row of each sample or token, and the
        segments.
        """
        if rows.index is not None:
            return rows.scales, rows.zero_points, rows.index, self.segments
        # Return the table itself, so that a graph recognises equal tables.
        scales, zero_points = (
            table if table.ndim == 2 else table.flatten(0, -2) for table in (rows.scales, rows.zero_points)
        )
        index = self.first if len(scales) == 1 else torch.arange(len(scales), device=scales.device)
        return scales, zero_points, index, self.segments

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Quantize `x` on its grids and return the layer's output, by operators that compute in integers."""
        assert rows is not None
        grid = self._grid(rows)
        values = (self.weight, self.weight_zero, self.scale, self.sums, self.bias)
        last = channels_last(x, self.channel_axis)
        if self.geometry is None:
            y = linear_codes(quantize_codes(last, *grid, rows.levels, ()), *grid, *values, "", None, x.dtype)
            return channels_back(y, self.channel_axis)
        images = last.unsqueeze(1) if last.ndim == 3 else last
        codes = quantize_codes(images, *grid, rows.levels, self.geometry.padding)
        y = convolution_codes(
            codes, *grid, *values, self.geometry.stride, self.geometry.dilation, "", None, x.dtype
        )
        return channels_back(y.squeeze(1) if last.ndim == 3 else y, self.channel_axis)


class WeightOnlyKernel(Integers):
    """A linear layer, or a convolution of single pixels, whose input is not quantized: integers at rest
    alone, unpacked in registers.
    """

    def __init__(self, source: IntegerWeight, *, nibbles: bool = False) -> None:
        super().__init__(source, nibbles=nibbles)
        self.channel_axis = source.operation.channel_axis

    def forward(self, x: Tensor, rows: Rows | None) -> Tensor:
        """Return the layer's output for `x` as it comes, with integer weights."""
        last = channels_last(x, self.channel_axis)
        y = linear_weight_only(last, self.segments, self.weight, self.weight_zero, self.scale, self.bias)
        return channels_back(y, self.channel_axis)


def operator_product(left: Tensor, left_rows: Rows, right: Tensor, right_rows: Rows) -> Tensor:
    """Return `left_hat @ right_hat` by the operator; the dtype is that of `left`."""
    a, b = ((rows.scale[:, 0], rows.zero_point[:, 0], rows.levels) for rows in (left_rows, right_rows))
    shape = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    return product_codes(
        left.expand(*shape, *left.shape[-2:]), *a, right.expand(*shape, *right.shape[-2:]), *b
    )
